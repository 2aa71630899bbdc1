"""Checks of engines: their GPUs and parallel sizes, adapters, and how new weights reach them.

A check raises ValueError with one line: the options, their values, and values that would fit.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rollout.engines.vllm_start import VllmSettings
from rollout.wire.model_folder import expert_count

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from deploy.config.config import RunConfig

_CPU_EXPERT_MULTIPLE = 32  # of vLLM's kernels for experts on CPUs


def require_engine(config: RunConfig) -> None:
    """Run every check. ValueError for the first contradiction."""
    for check in (_device, _parallel, _precision, _routing, _adapters, _transfer, _turns):
        check(config)


def _device(config: RunConfig) -> None:
    if unfit := config.engine.placement.unfit(config.rollout.gpus_per_worker):
        raise ValueError(f"engine.kind={config.engine.kind!r}: {unfit}")


def _parallel(config: RunConfig) -> None:
    """GPUs that are claimed are those that are used."""
    engine, gpus = config.engine, config.rollout.gpus_per_worker
    if not isinstance(engine, VllmSettings):
        return
    if engine.data_parallel_size > 1 and not (engine.expert_parallel and gpus):
        raise ValueError(
            f"engine.data_parallel_size={engine.data_parallel_size} repeats the whole model within an engine; raise "
            "rollout.workers instead, or divide a mixture's experts over GPUs: engine.expert_parallel=true"
        )
    if config.tiny is not None:
        _divided(engine, config.tiny.heads, config.tiny.layers, experts=False)
    shares_one = engine.placement.gpus == 1 and gpus <= 1
    if gpus and not shares_one and gpus != engine.placement.gpus:
        sizes = {
            "tensor_parallel_size": engine.tensor_parallel_size,
            "pipeline_parallel_size": engine.pipeline_parallel_size,
            "data_parallel_size": engine.data_parallel_size,
        }
        said = [f"engine.{name}={size}" for name, size in sizes.items() if size > 1]
        raise ValueError(
            f"an engine of {' * '.join(said) or 'engine.tensor_parallel_size=1'} runs on {engine.placement.gpus} "
            f"GPUs, but a worker claims rollout.gpus_per_worker={gpus:g}; use "
            f"rollout.gpus_per_worker={engine.placement.gpus}"
        )


def _routing(config: RunConfig) -> None:
    """An engine that records the experts of tokens where they are replayed."""
    engine = config.engine
    if not config.learner.model.router_replay:
        return
    if not engine.placement.tells_routing:
        raise ValueError(
            f"engine.kind={engine.kind!r} does not say which experts it chose, which learner.model.router_replay=true "
            "replays; use vllm or transformers"
        )
    if isinstance(engine, VllmSettings) and engine.pipeline_parallel_size > 1:
        raise ValueError(
            "vLLM does not say which experts it chose in engine.pipeline_parallel_size="
            f"{engine.pipeline_parallel_size} parts, which learner.model.router_replay=true replays; use 1 and "
            "engine.tensor_parallel_size"
        )


def require_divisible(config: RunConfig, architecture: PretrainedConfig) -> None:
    """ValueError for a model that the engine's parallel sizes do not divide."""
    engine, text = config.engine, architecture.get_text_config()
    if isinstance(engine, VllmSettings):
        experts = expert_count(architecture) > 0
        _divided(engine, int(text.num_attention_heads), int(text.num_hidden_layers), experts)
        if experts and not config.rollout.gpus_per_worker:
            wide = int(getattr(text, "moe_intermediate_size", None) or text.intermediate_size)
            _unpadded(wide, engine.tensor_parallel_size)


def _unpadded(wide: int, processes: int) -> None:
    """Experts' hidden layers in parts that vLLM on CPUs does not pad: it cannot load a new version into padded ones."""
    if wide % (processes * _CPU_EXPERT_MULTIPLE):
        raise ValueError(
            f"an expert's hidden size of {wide} in engine.tensor_parallel_size={processes} parts is no multiple of "
            f"{_CPU_EXPERT_MULTIPLE}: vLLM on CPUs pads it, and then loads no new weights; lower the size or use GPUs"
        )


def _divided(engine: VllmSettings, heads: int, layers: int, experts: bool) -> None:
    if heads % engine.tensor_parallel_size:
        raise ValueError(
            f"engine.tensor_parallel_size={engine.tensor_parallel_size} does not divide the model's {heads} attention "
            "heads; use one that does"
        )
    if engine.pipeline_parallel_size > layers:
        raise ValueError(
            f"engine.pipeline_parallel_size={engine.pipeline_parallel_size} exceeds the model's {layers} layers"
        )
    if engine.expert_parallel and not experts:
        raise ValueError(
            "engine.expert_parallel=true, but the model has no experts; use false, and raise "
            "engine.tensor_parallel_size or rollout.workers"
        )


def _precision(config: RunConfig) -> None:
    engine = config.engine
    if isinstance(engine, VllmSettings) and engine.coarseness > 1 and engine.dtype != "bfloat16":
        raise ValueError(
            f"engine.args stores weights, keys or values in fewer bits (quantization, kv_cache_dtype) than "
            f"engine.dtype={engine.dtype!r} has, and a quantized engine is published to in bfloat16; use "
            "engine.dtype='bfloat16'"
        )


def _adapters(config: RunConfig) -> None:
    lora = config.learner.model.lora
    if lora is None or lora.sync == "merged":
        return
    if lora.quantize_base:
        raise ValueError(
            f"learner.model.lora.sync='adapter' sends no base, and the engines' own is not the one in "
            f"learner.model.lora.quantize_base={lora.quantize_base!r} that the adapter is trained on; use sync='merged'"
        )
    if config.weights.transfer != "object_store":
        raise ValueError(
            f"learner.model.lora.sync='adapter' cannot be sent by weights.transfer={config.weights.transfer!r}, "
            "which sends whole weights; use 'object_store', or sync='merged'"
        )
    halves = config.engine.placement.half_adapters and config.engine.dtype == "float32"
    if config.rollout.gpus_per_worker and halves:
        raise ValueError(
            "learner.model.lora.sync='adapter' needs engine.dtype='bfloat16' or 'float16' on GPUs, where vLLM "
            "multiplies adapters in half precision only; set it, or use sync='merged'"
        )


def _transfer(config: RunConfig) -> None:
    transfer, gpus = config.weights.transfer, config.rollout.gpus_per_worker
    placement = config.engine.placement
    if transfer not in placement.transfers:
        raise ValueError(
            f"engine.kind={config.engine.kind!r} does not support weights.transfer={transfer!r}; use 'object_store'"
        )
    if transfer == "object_store":
        return
    if not gpus:
        raise ValueError(
            f"weights.transfer={transfer!r} needs GPUs, but rollout.gpus_per_worker=0; "
            "use 'object_store' or give the workers a GPU"
        )
    if config.learner.model.device != "cuda":
        raise ValueError(
            f"weights.transfer={transfer!r} sends from the learner's GPU, but learner.model.device='cpu'; "
            "use 'object_store' or train on 'cuda'"
        )
    if transfer == "nccl" and gpus < 1:
        raise ValueError(
            f"weights.transfer='nccl' needs whole GPUs, but rollout.gpus_per_worker={gpus:g}; use "
            f"rollout.gpus_per_worker={placement.gpus}"
        )
    if transfer == "ipc" and config.rollout.workers * gpus >= 1:
        raise ValueError(
            "weights.transfer='ipc' needs engines of one GPU each that share the learner's: keep rollout.workers * "
            "rollout.gpus_per_worker below 1 and engine.tensor_parallel_size at 1, or use 'nccl'"
        )


def _turns(config: RunConfig) -> None:
    """Engines and learner that have a GPU in turns."""
    if config.cluster.colocate is None:
        return
    turns = f"cluster.colocate={config.cluster.colocate!r}"
    for met, why in _against_turns(config):
        if met:
            raise ValueError(f"{turns} {why}")


def _against_turns(config: RunConfig) -> Iterator[tuple[bool, str]]:
    """What contradicts turns, and how to say it."""
    engine, gpus, ranks = config.engine, config.rollout.gpus_per_worker, config.learner.ranks
    sleeps, on_cuda = engine.placement.sleeps, config.learner.model.device == "cuda"
    several = bool(config.policies) or config.league is not None
    yield (
        config.replay is not None,
        "is between engines and a learner, but a replay has no engines; leave it out",
    )
    yield (
        config.buffer.max_lag > 0,
        f"is synchronous, as engines do not play while the learner learns, but buffer.max_lag={config.buffer.max_lag}; "
        "use buffer.max_lag=0, or GPUs of their own for engines and learner",
    )
    yield (
        config.weights.transfer != "object_store",
        f"has the learner away while engines load, but weights.transfer={config.weights.transfer!r} sends its live "
        "parameters; use 'object_store'",
    )
    yield (
        several,
        (
            "is for a run of one policy that meets no past versions: their engines would hold memory in the learner's "
            "turn; leave it out"
        ),
    )
    yield (
        sleeps is None,
        f"needs an engine that can sleep, which engine.kind={engine.kind!r} is not; use 'vllm' on GPUs",
    )
    yield (
        sleeps == "on_gpus" and not gpus,
        "needs rollout.gpus_per_worker=1: vLLM's sleep mode unmaps memory of CUDA, and does nothing on a CPU; use "
        "engine.kind='transformers' to try turns on CPUs",
    )
    yield (
        bool(gpus) and not (gpus == engine.placement.gpus == 1),
        f"is for engines of one whole GPU each, but rollout.gpus_per_worker={gpus:g} and the engine's parallel sizes "
        f"make {engine.placement.gpus}; use 1 for both",
    )
    yield (
        bool(gpus) != on_cuda,
        (
            f"shares GPUs, but learner.model.device={config.learner.model.device!r} and "
            f"rollout.gpus_per_worker={gpus:g}; use 'cuda' and 1"
        ),
    )
    yield (
        ranks > config.rollout.workers,
        (
            f"puts each rank on the GPU of an engine, but learner.ranks={ranks} exceeds "
            f"rollout.workers={config.rollout.workers}; have as many workers"
        ),
    )
