"""Whether a mixture of experts can be trained as the settings say. No weights are read."""

from __future__ import annotations

from transformers import PretrainedConfig, PreTrainedModel

from learner.model.footprint import blank_model
from learner.model.lora_targets import chosen
from learner.model.router_balance import recorder_of
from learner.model.router_replay import blocks_of
from learner.parallel.experts import experts_in, rows_by_expert
from learner.settings import ModelSettings


def require_mixture_of(config: PretrainedConfig, settings: ModelSettings, shards: int) -> None:
    """As `require_mixture`, of a model of this configuration."""
    if settings.expert_parallel or settings.router_balance or settings.router_replay or settings.compile:
        require_mixture(blank_model(config, settings.trust_remote_code), settings, shards)


def require_mixture(model: PreTrainedModel, settings: ModelSettings, shards: int) -> None:
    """ValueError, one line, for routers that the model has not, and for experts to which tokens cannot travel.

    shards: ranks that parameters are sharded over.
    """
    if settings.expert_parallel:
        _require_divisible(model, shards)
        _require_plain(model, settings)
    if settings.router_balance and recorder_of(model) is None:
        raise ValueError(
            "has no routers of experts whose logits are known; set learner.model.router_balance=0"
        )
    if settings.compile and blocks_of(model):
        raise ValueError("is a mixture of experts, which is not compiled; set learner.model.compile=false")
    if settings.router_replay and not blocks_of(model):
        raise ValueError("has no routers of experts; set learner.model.router_replay=false")


def _require_divisible(model: PreTrainedModel, shards: int) -> None:
    """ValueError for a model without experts, and for experts that so many ranks cannot divide."""
    found = experts_in(model)
    if not found:
        raise ValueError(
            "has no experts that tokens could travel to; set learner.model.expert_parallel=false"
        )
    for name, experts in found.items():
        if not rows_by_expert(experts):
            raise ValueError(
                f"keeps the experts of {name} in another form than a row of each parameter for every expert; set "
                "learner.model.expert_parallel=false"
            )
        if experts.num_experts % shards:
            raise ValueError(
                f"has {experts.num_experts} experts in {name}, which {shards} ranks do not divide; set "
                "learner.sharded_over (or learner.ranks) to a divisor, or learner.model.expert_parallel=false"
            )


def _require_plain(model: PreTrainedModel, settings: ModelSettings) -> None:
    """ValueError for an adapter whose base is quantized, or that changes experts: every rank has A and B of all."""
    if settings.quantized:
        raise ValueError(
            "stores its base in fewer bits, and gathers experts then; set learner.model.expert_parallel=false, or "
            "leave out learner.model.lora.quantize_base"
        )
    if settings.lora and (experts := chosen(model, settings.lora).experts):
        raise ValueError(
            f"trains an adapter of experts ({experts[0].rpartition('.')[2]}), to which tokens cannot travel; choose "
            "learner.model.lora.targets without them, or set learner.model.expert_parallel=false"
        )
