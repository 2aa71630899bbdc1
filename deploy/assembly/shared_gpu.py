"""An engine's share of a GPU that it has beside the learner, where the recipe leaves `engine.kv_cache_gib` open.

    KV cache = (GPU less a twentieth - what the learner holds at most) / engines - weights - vLLM's working memory

The learner holds less when engines start, and vLLM would take what is free then. What it will hold is estimated
(`manta check`); the twentieth is for what an estimate leaves out. A worker computes this for the GPU that it is on.
"""

from __future__ import annotations

from transformers import AutoConfig

from deploy.assembly.memory_plan import GIB, VLLM_WORKING, MemoryPlan, ModelFacts, engine_weights
from deploy.config.config import RunConfig
from deploy.config.config_errors import ConfigError
from rollout.engines.vllm_start import VllmSettings
from rollout.wire.model_folder import pretrained

UNTOLD = (
    "weights.transfer='ipc': what the learner's activations take beside the engines cannot be told for this model; set "
    "engine.kv_cache_gib"
)


def beside_learner(run: RunConfig, path: str, gpu_bytes: int) -> VllmSettings:
    """The engine's settings with its share of a GPU of so many bytes. path: of the model's folder.

    ConfigError where the learner leaves no room for one sequence, or what it holds cannot be told.
    """
    engine = run.engine
    assert isinstance(engine, VllmSettings)
    model = ModelFacts.of(pretrained(AutoConfig, path, run.learner.model.trust_remote_code), run)
    if model.saved is None:
        raise ConfigError(UNTOLD)
    plan = MemoryPlan.of(run, model, gpu_bytes)
    cache, weights = plan.cache, engine_weights(run, model)
    assert cache is not None
    if cache.sequences(run.rollout.context_tokens) < 1:
        held = plan.process("learner").peak(on_host=False)
        raise ConfigError(
            f"weights.transfer='ipc': beside a learner of {held / GIB:.3g} GiB and weights of {weights / GIB:.3g} GiB, "
            f"a GPU of {gpu_bytes / GIB:.3g} GiB has no room for a KV cache; lower learner.tokens_per_microbatch, or "
            "give engines GPUs of their own"
        )
    share = (weights + VLLM_WORKING + cache.nbytes) / gpu_bytes
    return engine.model_copy(update={"kv_cache_gib": cache.nbytes / GIB, "memory_fraction": share})
