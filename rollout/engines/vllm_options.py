"""Checks of a recipe's table `engine.args`: arguments for vLLM by vLLM's own names, without importing vLLM.

    [engine.args]
    max_num_batched_tokens = 16384
    attention_backend = "FLASHINFER"
    compilation_config = { cudagraph_mode = "FULL_DECODE_ONLY" }

What Manta decides itself is refused with the option that decides it; what would break a promise about the tokens or
their logprobs is refused with the reason. Values within vLLM's own configurations are checked by vLLM at its start.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

from pydantic import TypeAdapter, ValidationError

from rollout.engines.vllm_arguments import VllmArguments
from rollout.engines.vllm_tables import TABLES

# Quantizations of published weights while they are loaded, which need no quantized checkpoint.
QUANTIZATIONS = (
    "fp8",
    "fp8_per_tensor",
    "fp8_per_block",
    "fp8_per_channel",
    "mxfp8",
    "mxfp4",
    "int8_per_channel_weight_only",
    "nvfp4_per_token",
)
_FOUR_BITS = frozenset(
    (
        *("mxfp4", "nvfp4_per_token"),  # of weights, and of keys and values:
        *("nvfp4", "nvfp4_4over6", "nvfp4_ds_mla", "int4_per_token_head", "ultraquant_4bit"),
        *("turboquant_k8v4", "turboquant_4bit_nc", "turboquant_k3v4_nc", "turboquant_3bit_nc"),
    )
)
_PLACED = "Manta places an engine's processes: use engine.{tensor,pipeline,data}_parallel_size"
_SAMPLED = (
    "the learner computes with the whole distribution that tokens are sampled from; use the section sampling"
)
_ADAPTER = "an engine serves the adapter that the learner trains; use learner.model.lora"
_MODEL = "an engine loads the model that the learner trains; use learner.model.path"
_GENERATES = "an engine takes token ids and generates token ids"
# Why an argument is not the recipe's, by the names that it is said of, separated by spaces.
_DECIDED: dict[str, str] = {
    "model model_weights tokenizer tokenizer_mode tokenizer_revision revision code_revision hf_config_path "
    "config_format served_model_name hf_token model_impl model_class_overrides": _MODEL,
    "hf_overrides": "the learner reads the model's own config.json, and both must be the same; change that file, or "
    "use engine.head_dtype",
    "trust_remote_code": "use learner.model.trust_remote_code",
    "dtype": "use engine.dtype",
    "seed": "every request has a seed of its own, derived from the run's; use seed, and engine.seeded",
    "max_model_len": "use rollout.context_tokens",
    "max_num_seqs": "use engine.max_num_seqs",
    "gpu_memory_utilization": "use engine.memory_fraction",
    "kv_cache_memory_bytes": "use engine.kv_cache_gib",
    "enforce_eager": "use engine.enforce_eager",
    "tensor_parallel_size": "use engine.tensor_parallel_size",
    "pipeline_parallel_size": "use engine.pipeline_parallel_size",
    "data_parallel_size": "use engine.data_parallel_size",
    "enable_expert_parallel": "use engine.expert_parallel",
    "prefill_context_parallel_size": "Manta counts GPUs by the other parallel sizes; use engine.tensor_parallel_size",
    "distributed_executor_backend nnodes node_rank master_addr master_port device_ids data_parallel_rank "
    "data_parallel_start_rank data_parallel_size_local data_parallel_address data_parallel_rpc_port "
    "data_parallel_hybrid_lb data_parallel_external_lb data_parallel_multi_port_external_lb data_parallel_backend "
    "enable_elastic_ep elastic_ep_max_dp_size enable_fault_tolerance fault_tolerance_config "
    "ray_workers_use_nsight": _PLACED,
    "weight_transfer_config": "use weights.transfer",
    "enable_sleep_mode": "an engine sleeps where a learner shares its GPU in turns; use cluster.colocate",
    "worker_cls worker_extension_cls": "Manta's own receives and proves new weights in vLLM's workers",
    "generation_config override_generation_config logits_processors watermark_config return_sampling_mask": _SAMPLED,
    "logprobs_mode max_logprobs": "stored logprobs are those of the distribution that tokens are sampled from",
    "enable_lora max_loras max_lora_rank default_mm_loras max_cpu_loras lora_dtype lora_target_modules "
    "enable_tower_connector_lora enable_mixed_moe_lora_format enable_moe_shared_loras max_lora_cls_labels": _ADAPTER,
    "runner convert pooler_config skip_tokenizer_init enable_prompt_embeds tokens_only diffusion_config "
    "io_processor_plugin": _GENERATES,
    "enable_return_routed_experts aux_output_config": "use learner.model.router_replay",
    "quantization_config": "name a quantization of weights while they are loaded: engine.args.quantization",
}
DECIDED = {name: why for names, why in _DECIDED.items() for name in names.split()}


def check_arguments(args: Mapping[str, Any]) -> None:
    """Raise ValueError, one line, for the first argument that vLLM does not have, or that is not the recipe's."""
    for name, value in args.items():
        where = f"engine.args.{name}"
        if name in DECIDED:
            raise ValueError(f"{where}: {DECIDED[name]}")
        _require_known(where, name, VllmArguments.__annotations__)
        _require_type(where, name, value)
        if name in TABLES and isinstance(value, dict):
            for inner in value:
                _require_known(f"{where}.{inner}", inner, TABLES[name].split())
    _require_loadable(args)


def coarseness(args: Mapping[str, Any]) -> float:
    """How much coarser than bfloat16 the stored weights, or keys and values, are rounded; 1: no coarser.

    A bfloat16 has 8 bits of precision, the types of 8 bits have 4 (e4m3; e5m2 has 3), those of 4 bits have 2.
    """
    said = [str(args.get("quantization") or ""), str(args.get("kv_cache_dtype", "auto"))]
    stored = [each for each in said if each not in ("", "auto", "float16", "bfloat16")]
    return 64.0 if _FOUR_BITS.intersection(stored) else 16.0 if stored else 1.0


def vllm_argument(option: str) -> str:
    """The option that gives vLLM what another section's option is called in vLLM; empty if it is no argument."""
    parts = option.split(".")
    place = next((i for i, part in enumerate(parts) if part in VllmArguments.__annotations__), None)
    return "" if place is None or parts[place] in DECIDED else ".".join(["engine.args", *parts[place:]])


def _require_known(where: str, name: str, known: Iterable[str]) -> None:
    names = list(known)
    if name in names:
        return
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    section = where.rpartition(".")[0]
    hint = f"; did you mean {section}.{near[0]}?" if near else ""
    raise ValueError(f"{where}: vLLM 0.32 has no such argument{hint}")


def _require_type(where: str, name: str, value: Any) -> None:
    try:
        _arguments().validate_python({name: value}, strict=True)
    except ValidationError as error:
        messages = dict.fromkeys(fault["msg"] for fault in error.errors())
        raise ValueError(f"{where}: {' or '.join(messages)} (got {value!r})") from error


def _require_loadable(args: Mapping[str, Any]) -> None:
    if args.get("load_format") == "dummy":
        raise ValueError(
            "engine.args.load_format='dummy' leaves weights random that an adapter or an evaluation needs; remove it"
        )
    quantization = args.get("quantization")
    if quantization is not None and quantization not in QUANTIZATIONS:
        raise ValueError(
            f"engine.args.quantization={quantization!r} needs a quantized checkpoint, but the learner publishes whole "
            f"numbers of engine.dtype; use one of {', '.join(QUANTIZATIONS)}"
        )


@cache
def _arguments() -> TypeAdapter[VllmArguments]:
    return TypeAdapter(VllmArguments)
