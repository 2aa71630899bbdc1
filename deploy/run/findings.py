"""What looks wrong about a job, from its recipe, its figures and its memory; each finding is one line with a remedy.

`certain`: a run would be refused, or fail at its start. Everything else is worth a look, and a run starts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from transformers import PretrainedConfig

from deploy.assembly.memory_plan import GIB, UNTOLD_SHARE, VLLM_WORKING, MemoryPlan, ModelFacts
from deploy.assembly.shared_gpu import UNTOLD
from deploy.config.config import RunConfig
from deploy.config.config_checks import config_warnings
from deploy.config.processor import multiplies_bfloat16
from deploy.run.job_size import DiskUse, JobSize
from learner.training.memory_estimate import state_bytes
from rollout.engines.vllm_start import VllmSettings

# Learning rates of reinforcement learning that are in use for pretrained models, all weights and adapters: GRPO recipes
# of verl (1e-6, with LoRA 3e-6), TRL (1e-6), AReaL (6e-6 to 1.7e-5); up to ten times as much for adapters (Schulman et
# al. 2025, "LoRA Without Regret"). The bounds leave a factor of a few to either side.
FULL_RATES = (1e-7, 5e-5)
ADAPTER_RATES = (1e-6, 5e-4)


@dataclass(frozen=True, slots=True)
class Finding:
    """One line. certain: a run would be refused."""

    text: str
    certain: bool = False


def of_recipe(config: RunConfig) -> Iterator[Finding]:
    """What the options themselves show."""
    yield from map(Finding, config_warnings(config))
    yield from _batch(config)
    yield from _rates(config)
    yield from _types(config)
    yield from _unsaved(config)
    yield from _gpus(config)


def of_job(config: RunConfig, size: JobSize) -> Iterator[Finding]:
    """What shows once the data's rows are known."""
    groups = config.buffer.groups_per_step
    for each in size.data:
        if each.rows is not None and each.rows < groups and len(size.data) == 1:
            yield Finding(
                f"the data has {each.rows} rows, but a step trains on {groups} groups: a row is played more than once "
                f"a step; lower buffer.groups_per_step to {each.rows} or less"
            )
        if each.evaluation_tasks < (asked := config.evaluation.tasks):
            yield Finding(
                f"evaluation.tasks={asked}, but {each.name} has only {each.evaluation_tasks} rows to evaluate on, and "
                "the intervals are as wide as these allow; lower evaluation.tasks, or give more by evaluation.options"
            )


def of_memory(config: RunConfig, model: ModelFacts, plan: MemoryPlan, gpu_bytes: int) -> Iterator[Finding]:
    """What does not fit into the memory of GPUs and of engines."""
    learner = plan.process("learner")
    if learner.on_gpu:
        always = state_bytes(config.learner, model.shape, model.lora)
        yield from _learner_gpu(config, plan, gpu_bytes, always)
    if plan.cache is not None:
        yield from _cache(config, plan, told=model.saved is not None)


def of_shared_rows(
    config: RunConfig, architecture: PretrainedConfig, plan: MemoryPlan, gpu_bytes: int
) -> Iterator[Finding]:
    """Whether ranks of the learner compute a row together that each has room for alone."""
    learner, together = config.learner, config.learner.context_parallel_size
    if together == 1 or not plan.process("learner").on_gpu or learner.ranks > config.buffer.groups_per_step:
        return
    alone = config.model_copy(update={"learner": learner.model_copy(update={"context_parallel_size": 1})})
    model = ModelFacts.of(architecture, alone)
    if model.saved is None:  # what activations take is not told
        return
    plan_alone = MemoryPlan.of(alone, model, gpu_bytes)
    peak, (room, _) = plan_alone.process("learner").peak(on_host=False), _room(alone, plan_alone, gpu_bytes)
    if peak <= (1 - UNTOLD_SHARE) * room:
        more = plan.traffic.row - plan_alone.traffic.row
        yield Finding(
            f"learner.context_parallel_size={together}, but a rank has room for its rows alone ({peak / GIB:.3g} "
            f"GiB of {room / GIB:.3g}): together they exchange {more / GIB:.3g} GiB more for a row and have "
            f"{together} times fewer rows at once; use 1"
        )


def of_host(needed: int, free_bytes: int) -> Iterator[Finding]:
    """What this machine's memory has no room for, of the processes of all policies."""
    if needed > free_bytes:
        yield Finding(
            f"all processes hold {needed / GIB:.3g} GiB at most, of which this machine has {free_bytes / GIB:.3g} "
            "GiB free; lower learner.tokens_per_microbatch, set learner.model.gradient_checkpointing = true, or "
            "take a smaller model"
        )


def of_disk(config: RunConfig, use: DiskUse, free_bytes: int) -> Iterator[Finding]:
    """What this machine's disk has no room for. use: of all policies."""
    if use.checkpoints > free_bytes:
        yield Finding(
            f"checkpoints need {use.checkpoints / GIB:.3g} GiB (checkpoint.keep={config.checkpoint.keep}, and one that "
            f"is being written), but the disk has {free_bytes / GIB:.3g} GiB free: the run would pause"
        )
    elif use.total > free_bytes:
        yield Finding(
            f"checkpoints and all rows need up to {use.total / GIB:.3g} GiB, but the disk has "
            f"{free_bytes / GIB:.3g} GiB free; set buffer.disk_gib"
        )


def of_policies(found: Mapping[str, Iterable[Finding]]) -> Iterator[Finding]:
    """The findings of a run's policies, each once; one that is not about all of them names whom it is about."""
    about: dict[Finding, list[str]] = {}
    for policy, findings in found.items():
        for each in dict.fromkeys(findings):
            about.setdefault(each, []).append(policy)
    for each, policies in about.items():
        if len(policies) == len(found):
            yield each
        else:
            whom = "policy" if len(policies) == 1 else "policies"
            yield Finding(f"{whom} {', '.join(policies)}: {each.text}", each.certain)


# Of the recipe -----------------------------------------------------------------------------------------------------


def _batch(config: RunConfig) -> Iterator[Finding]:
    groups, learner = config.buffer.groups_per_step, config.learner
    shares = learner.shares
    if groups % shares:
        yield Finding(
            f"buffer.groups_per_step={groups} is not divisible by {learner.shares_option}={shares}: some ranks wait "
            f"for others; use {groups // shares * shares} or {(groups // shares + 1) * shares}"
        )
    episodes, parts = groups * config.rollout.group_size, config.learner.algorithm.minibatches
    if episodes // shares % parts:
        yield Finding(
            f"{episodes // shares} episodes a rank are not divisible by learner.algorithm.minibatches={parts}: "
            "optimizer steps differ in their number of episodes"
        )
    slots = groups * (config.buffer.max_lag + 1)
    playing = config.rollout.workers * config.rollout.concurrent_groups
    if playing > slots and not config.replay:
        yield Finding(
            f"workers could play {playing} groups at once (rollout.workers * rollout.concurrent_groups), but the "
            f"buffer has {slots} slots (buffer.groups_per_step * (buffer.max_lag + 1)): the rest waits"
        )


def _rates(config: RunConfig) -> Iterator[Finding]:
    if config.tiny is not None:
        return  # a model from nothing takes larger ones
    lora, rate = config.learner.model.lora, config.learner.optim.learning_rate
    low, high = ADAPTER_RATES if lora else FULL_RATES
    if not low <= rate <= high:
        what = "an adapter" if lora else "all weights of a pretrained model"
        yield Finding(
            f"learner.optim.learning_rate={rate:g} is unusual for {what}: recipes use {low:g} to {high:g}"
        )


def _types(config: RunConfig) -> Iterator[Finding]:
    algorithm, engine, learner = config.learner.algorithm, config.engine.dtype, config.learner.model.dtype
    corrected = any(part.needs_ratio for part in algorithm.corrections)
    stored = isinstance(config.engine, VllmSettings) and config.engine.coarseness > 1
    if (
        (engine != learner or stored or config.learner.model.float8)
        and not corrected
        and algorithm.proximal == "behavior"
        and algorithm.loss.clips
    ):
        ours = "engine.args (quantization, kv_cache_dtype)" if stored else f"engine.dtype={engine!r}"
        own = "float8=true" if config.learner.model.float8 else f"dtype={learner!r}"
        yield Finding(
            f"{ours} and learner.model.{own} round differently, and no correction weighs "
            "that: the clip drops tokens for rounding alone; use learner.algorithm.proximal='learner' and "
            "corrections=[{kind='tis'}]"
        )
    slow = {
        "engine.dtype": engine == "bfloat16" and not config.rollout.gpus_per_worker,
        "learner.model.dtype": learner == "bfloat16" and config.learner.model.device == "cpu",
    }
    if any(slow.values()) and not multiplies_bfloat16():
        yield Finding(
            f"{' and '.join(name for name, found in slow.items() if found)}='bfloat16': this processor emulates it, "
            "several times slower than float32; leave the data types open or use 'float32'"
        )


def _unsaved(config: RunConfig) -> Iterator[Finding]:
    every, steps = config.checkpoint.every_steps, config.steps
    if every >= steps > 10:
        yield Finding(
            f"checkpoint.every_steps={every} saves nothing between version 0 and the last of steps={steps}: what is "
            "lost on the way is learned again from version 0"
        )
    if not config.evaluation.evaluates and not config.replay:
        yield Finding("evaluation.tasks=0: nothing says how much was learned; set evaluation.tasks")


def _gpus(config: RunConfig) -> Iterator[Finding]:
    engine, gpus = config.engine, config.rollout.gpus_per_worker
    if gpus and isinstance(engine, VllmSettings) and engine.enforce_eager:
        yield Finding(
            "engine.enforce_eager=true decodes without CUDA graphs, at small batches several times slower; use false "
            "for long runs on GPUs"
        )
    if config.learner.model.device == "cuda" and config.learner.model.dtype == "float32":
        yield Finding(
            "learner.model.dtype='float32' on a GPU has neither fast products nor the variable-length attention; use "
            "'bfloat16'"
        )


# Of the memory -----------------------------------------------------------------------------------------------------


def _room(config: RunConfig, plan: MemoryPlan, gpu_bytes: int) -> tuple[int, str]:
    """Bytes of a GPU that a rank of the learner has, and beside what."""
    if config.cluster.colocate == "turns":
        return gpu_bytes - VLLM_WORKING, f", beside sleeping engines of {VLLM_WORKING / GIB:.3g} GiB"
    if config.weights.transfer == "ipc" and config.workers and not config.replay:
        engines = config.rollout.workers * plan.process("rollout worker").peak(on_host=False)
        return gpu_bytes - engines, f", beside engines of {engines / GIB:.3g} GiB"
    return gpu_bytes, ""


def _learner_gpu(config: RunConfig, plan: MemoryPlan, gpu_bytes: int, always: int) -> Iterator[Finding]:
    (room, shared), peak = _room(config, plan, gpu_bytes), plan.process("learner").peak(on_host=False)
    model, adapter = config.learner.model, ""
    if model.lora is None:
        adapter = "train an adapter (learner.model.lora), "
    elif not (model.lora.quantize_base or model.lora.sync == "adapter" or model.expert_parallel):
        adapter = "quantize the adapter's base (learner.model.lora.quantize_base), "
    remedy = (
        f"raise learner.ranks (with learner.context_parallel_size if rows are too long), {adapter}lower "
        "learner.tokens_per_microbatch, or set learner.optim.moments = 8bit, learner.optim.offload = true or "
        "learner.model.gradient_checkpointing = true"
    )
    if peak > room:
        yield Finding(
            f"a rank of the learner holds {peak / GIB:.3g} GiB, which does not fit into {gpu_bytes / GIB:.3g} GiB of a "
            f"GPU{shared}; {remedy}",
            certain=always > room,
        )


def _cache(config: RunConfig, plan: MemoryPlan, told: bool) -> Iterator[Finding]:
    """told: what the learner's activations take is known."""
    cache, engine = plan.cache, config.engine
    assert cache is not None and isinstance(engine, VllmSettings)
    if config.weights.transfer == "ipc" and engine.kv_cache_gib is None and not told:
        yield Finding(UNTOLD, certain=True)
        return
    context = config.rollout.context_tokens
    fits = cache.sequences(context)
    remedy = "raise engine.kv_cache_gib"
    if config.rollout.gpus_per_worker and engine.kv_cache_gib is None:
        remedy = "raise engine.memory_fraction or engine.tensor_parallel_size"
        if config.weights.transfer == "ipc":
            remedy = "lower learner.tokens_per_microbatch, or give engines GPUs of their own"
    if fits < 1:
        yield Finding(
            f"the engine's KV cache of {max(cache.nbytes, 0) / GIB:.3g} GiB does not hold one sequence of "
            f"rollout.context_tokens={context}; {remedy}",
            certain=True,
        )
        return
    at_once = min(engine.max_num_seqs, config.rollout.episodes)
    if fits < at_once:
        yield Finding(
            f"the engine's KV cache holds {fits:.0f} sequences of {context} tokens, but up to {at_once} are decoded at "
            f"once: where all grow long, some are evicted and computed again; {remedy}, or lower "
            "rollout.concurrent_groups or engine.max_num_seqs"
        )
    if config.rollout.episodes > engine.max_num_seqs:
        yield Finding(
            f"a worker plays {config.rollout.episodes} episodes at once, but its engine decodes "
            f"engine.max_num_seqs={engine.max_num_seqs}: the rest waits"
        )
