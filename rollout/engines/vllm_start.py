"""Settings of a vLLM engine, and the start of vLLM's processes with them."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator

from envs.user_functions import load_function
from rollout.engines import vllm_fork_server
from rollout.engines.engine import Engine, EngineStart, Placement
from rollout.engines.vllm_options import check_arguments, coarseness
from rollout.wire.adapter import AdapterSpec
from rollout.wire.model_folder import pretrained, token_count

_CPU_CACHE_BYTES = 1 << 30
# Tokens of a cached block. Only whole blocks are shared by prompts that begin alike. vLLM's default on CPUs, 128, is
# longer than most prompts there: siblings of a group, and turns of an episode, would share nothing.
_CPU_BLOCK_TOKENS = 32


class VllmSettings(BaseModel):
    """Settings of one vLLM instance."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    starter: ClassVar[str] = "rollout.engines.vllm_engine:start"

    kind: Literal["vllm"] = "vllm"
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "bfloat16",
        description="data type of the engine's weights and computation. float32 matches a float32 learner "
        "more closely. Not set in a recipe for CPUs: float32 where the processor does not multiply bfloat16, as "
        "`manta doctor` says",
    )
    max_num_seqs: int = Field(
        256,
        gt=0,
        description="most sequences decoded in one batch. Lower it if the KV cache overflows, raise it for "
        "throughput on large GPUs",
    )
    tensor_parallel_size: int = Field(
        1,
        gt=0,
        description="GPUs over which every layer is divided. On CPUs so many processes divide it. An engine takes "
        "tensor_parallel_size * pipeline_parallel_size * data_parallel_size GPUs: give rollout.gpus_per_worker as many",
    )
    pipeline_parallel_size: int = Field(
        1,
        gt=0,
        description="GPUs, or groups of tensor_parallel_size, over which the layers are dealt in order",
    )
    data_parallel_size: int = Field(
        1,
        gt=0,
        description="copies of the attention layers within one engine, for mixtures of experts whose experts are "
        "divided over all of its GPUs (expert_parallel). For other models raise rollout.workers instead",
    )
    expert_parallel: bool = Field(
        False,
        description="divide a mixture's experts over the engine's GPUs, instead of dividing each expert",
    )
    memory_fraction: float = Field(
        0.85,
        gt=0,
        le=1,
        description="fraction of a GPU's memory that the engine may use, weights and KV cache. Derived where "
        "a learner shares the GPU (weights.transfer=ipc) and kv_cache_gib is not set",
    )
    kv_cache_gib: float | None = Field(
        None,
        gt=0,
        description="size of the KV cache, GiB. Not set: 1 on a CPU; on a GPU what memory_fraction leaves beside "
        "the weights, and with weights.transfer=ipc what the learner leaves at its estimated peak (manta check)",
    )
    threads: int = Field(1, gt=0, description="compute threads of an engine on CPU")
    enforce_eager: bool | None = Field(
        None,
        description="run without compilation and CUDA graphs: starts faster, decodes slower. Not set: false on GPUs, "
        "true on CPUs",
    )
    head_dtype: Literal["float32", "model"] | None = Field(
        None,
        description="data type that logits are computed in: the learner's are float32; model is that of the engine. "
        "Not set: float32 on GPUs, where the product is accumulated in it anyway, and model on CPUs",
    )
    seeded: bool = Field(
        False, description="seed every request, so that a run samples the same tokens again; slower"
    )
    args: dict[str, Any] = Field(
        default_factory=dict,
        description="any other argument of vLLM's engine, by its name in vLLM (AsyncEngineArgs), such as "
        "max_num_batched_tokens, attention_backend, kv_cache_dtype, quantization, speculative_config or "
        "compilation_config. Names and types are checked before a run starts; what Manta decides itself is refused",
    )

    @field_validator("args")
    @classmethod
    def _are_vllms(cls, args: dict[str, Any]) -> dict[str, Any]:
        check_arguments(args)
        return args

    def kv_cache_bytes(self, on_gpu: bool) -> int | None:
        """Size of the KV cache; None: what `memory_fraction` leaves beside the weights."""
        if self.kv_cache_gib is None:
            return None if on_gpu else _CPU_CACHE_BYTES
        return int(self.kv_cache_gib * 2**30)

    def eager(self, on_gpu: bool) -> bool:
        """Whether nothing is compiled, and no CUDA graph is recorded."""
        return not on_gpu if self.enforce_eager is None else self.enforce_eager

    def float32_head(self, on_gpu: bool) -> bool:
        """Whether logits are computed in float32 although the engine computes in another type."""
        asked = on_gpu if self.head_dtype is None else self.head_dtype == "float32"
        return asked and self.dtype != "float32"

    @property
    def coarseness(self) -> float:
        """How much coarser than bfloat16 it stores weights, or keys and values; 1: no coarser."""
        return coarseness(self.args)

    @property
    def shards(self) -> int:
        """Devices that one copy of the weights is divided over."""
        return self.tensor_parallel_size * self.pipeline_parallel_size

    @property
    def placement(self) -> Placement:
        return Placement(
            device="any",
            gpus=self.shards * self.data_parallel_size,
            maps_weights=True,  # its processes are separate
            concurrent_requests=self.max_num_seqs,
            transfers=("object_store", "nccl", "ipc"),
            tells_routing=True,
            half_adapters=True,
            sleeps="on_gpus",
        )

    def require_here(self) -> None:
        """Raise ValueError if vLLM is not installed."""
        if find_spec("vllm") is None:
            raise ValueError(
                "vLLM is not installed here; install Manta with the extra cpu or gpu, or use engine.kind='transformers'"
            )
        if any(isinstance(value, dict) for value in self.args.values()):
            as_vllm_takes(self.args)  # imports vLLM, which takes seconds

    def reproducible(self) -> VllmSettings:
        """Return settings under which a request's seed determines its samples."""
        return self.model_copy(update={"seeded": True})

    async def start(self, start: EngineStart) -> Engine:
        """Start vLLM's processes."""
        engine: Engine = await load_function(self.starter)(start, self)
        return engine


def prepare_process(settings: VllmSettings, on_gpu: bool, transfer: str) -> bool:
    """What precedes the import of vLLM: set environment variables, and begin the fork server; True if it was begun."""
    if transfer == "ipc":
        # IPC handles contain dtypes, which vLLM can send to its worker processes only as pickles.
        os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    if not on_gpu:
        # By default vLLM binds one core and reserves another, which would starve a second engine on the machine.
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        os.environ["OMP_NUM_THREADS"] = str(settings.threads)
        if settings.eager(on_gpu):
            # One function of vLLM's sampler would still be compiled with a C++ compiler in the first step, which blocks
            # the engine for 15 s. Without compilation it takes microseconds.
            os.environ["TORCH_COMPILE_DISABLE"] = "1"
    return not on_gpu and vllm_fork_server.begin()


def start_llm(
    model: str,
    context_tokens: int,
    settings: VllmSettings,
    on_gpu: bool,
    adapters: Sequence[AdapterSpec] = (),
    sees: bool = False,
    trusted: bool = False,
    routing: bool = False,
    sleeps: bool = False,
) -> Any:
    """Start vLLM's processes, after `prepare_process`, and return its AsyncLLM.

    adapters: room for as many at once, of their ranks and layers. sees: the model has vision, and vLLM's processor of
    pictures needs the tokenizer. trusted: code that comes with the model may be executed. routing: requests return the
    experts of tokens. sleeps: its memory can be unmapped and mapped again, which vLLM does on GPUs alone.
    """
    from vllm.config.weight_transfer import WeightTransferConfig
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.async_llm import AsyncLLM

    from rollout.engines import vllm_adapter

    ours: dict[str, Any] = {
        "model": model,
        "trust_remote_code": trusted,
        "dtype": settings.dtype,
        "max_model_len": context_tokens,
        "max_num_seqs": settings.max_num_seqs,
        "tensor_parallel_size": settings.tensor_parallel_size,
        "pipeline_parallel_size": settings.pipeline_parallel_size,
        "data_parallel_size": settings.data_parallel_size,
        "enable_expert_parallel": settings.expert_parallel,
        "enforce_eager": settings.eager(on_gpu),
        "hf_overrides": {"head_dtype": "float32"} if settings.float32_head(on_gpu) else {},
        "enable_prefix_caching": True,
        "skip_tokenizer_init": not sees,
        "generation_config": "vllm",  # no sampling defaults from the model's folder
        "logprobs_mode": "processed_logprobs",  # of the distribution sampled from, temperature included
        "weight_transfer_config": WeightTransferConfig(backend="manta"),
        "worker_extension_cls": "rollout.engines.vllm_weights.WorkerExtension",
        "disable_log_stats": True,
        "enable_sleep_mode": sleeps,
        "logits_processors": _logits_processors(model, trusted),
        "enable_return_routed_experts": routing and on_gpu,
    }
    low_rank = vllm_adapter.arguments(adapters) if adapters else {}
    arguments = AsyncEngineArgs(
        **(ours | _memory(settings, on_gpu) | low_rank | as_vllm_takes(settings.args))
    )
    if on_gpu or not routing:
        return AsyncLLM.from_engine_args(arguments)
    # Asked for here, as vLLM refuses it for its model runner on CPUs, which vllm_routing_cpu.py extends.
    config = arguments.create_engine_config(UsageContext.ENGINE_CONTEXT)
    config.aux_output_config.enable_return_routed_experts = True
    return AsyncLLM.from_vllm_config(config, disable_log_stats=True)


def gpu_bytes() -> int:
    """Memory of this process's GPU, as vLLM finds it: without a context of CUDA."""
    from vllm.platforms import current_platform

    return int(current_platform.get_device_total_memory())


def _memory(settings: VllmSettings, on_gpu: bool) -> dict[str, Any]:
    share, block = {"gpu_memory_utilization": settings.memory_fraction}, {"block_size": _CPU_BLOCK_TOKENS}
    cache_bytes = settings.kv_cache_bytes(on_gpu)
    return {**(share if on_gpu else block), **({"kv_cache_memory_bytes": cache_bytes} if cache_bytes else {})}


def as_vllm_takes(args: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe's arguments with tables as vLLM's own configurations. ValueError, one line, for one it refuses."""
    from vllm.engine.arg_utils import AsyncEngineArgs

    types: dict[str, Any] = {field.name: field.type for field in dataclasses.fields(AsyncEngineArgs)}
    taken = dict(args)
    for name, value in args.items():
        if isinstance(value, dict):
            try:
                taken[name] = TypeAdapter(types[name]).validate_python(value)
            except ValidationError as error:
                fault = error.errors()[0]
                where = ".".join(["engine.args", name, *(str(each) for each in fault["loc"])])
                raise ValueError(f"{where}: {fault['msg']} (got {fault['input']!r})") from error
            except (
                KeyError,
                TypeError,
            ) as error:  # of vLLM's own validators, for a choice that they do not have
                raise ValueError(f"engine.args.{name}: vLLM refuses {value!r}: {error}") from error
    return taken


def _logits_processors(model: str, trusted: bool) -> list[str | type]:
    """What keeps ids that no token has from being sampled, if the model has any."""
    from transformers import AutoConfig

    count = token_count(model)
    if count is None or count >= pretrained(AutoConfig, model, trusted).get_text_config().vocab_size:
        return []
    from rollout.engines.vllm_vocabulary import PROCESSOR

    return [PROCESSOR]
