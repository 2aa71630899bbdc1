"""What every process of a run will hold in memory, from its recipe and its model's configuration; nothing is started.

The constants of processes were measured on CPUs (docs/performance.md); vLLM's working memory on a GPU is an assumption.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from transformers import AutoConfig, PretrainedConfig

from deploy.assembly.fetching import fetch
from deploy.assembly.models import model_of
from deploy.config.config import RunConfig
from deploy.config.config_errors import ConfigError
from learner.model.footprint import Saved, Shape, blank_model, saved_by, shape_of
from learner.model.lora_targets import NO_ADAPTER, Sizes
from learner.model.router_replay import routing_bytes
from learner.parallel.traffic import Traffic, Travel
from learner.training.memory_estimate import (
    Amount,
    away_amount,
    base_bytes,
    head_bytes,
    hidden_exchanged,
    host_amounts,
    host_share,
    learner_amounts,
    settled,
    slice_tokens,
    slices_exchanged,
    stage_amounts,
)
from rollout.engines.vllm_start import VllmSettings
from rollout.wire.model_folder import pretrained

GIB = 2**30
DRIVER = "driver"  # the process that drives a run, of all policies
SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}  # bytes of a number

_BUFFER_PROCESS = int(0.16 * GIB)  # Python with Ray and Arrow
_TORCH_PROCESS = int(0.5 * GIB)  # with torch and transformers: driver, a learner's rank
_WORKER_PROCESS = int(0.7 * GIB)  # with vLLM's client too
_VLLM_PROCESSES = int(1.7 * GIB)  # vLLM's own two processes on a CPU
VLLM_WORKING = 3 * GIB  # on a GPU: activations, CUDA graphs, the context
UNTOLD_SHARE = 0.05  # of a GPU: what an estimate leaves out
_ROW_BYTES = 16  # of a stored token: id, logprob, version, text
_STARTED = Amount("the process itself", _TORCH_PROCESS, on_host=True)


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What the plan needs to know of a model."""

    family: str
    shape: Shape
    saved: Saved | None  # None: cannot be told for this family
    cached_numbers: int  # keys and values that an engine keeps of a token
    key_heads: int
    width: int  # of the hidden states
    vocabulary: int  # rows of the head
    tied_head: int  # entries of a head that is the embedding too; 0 where it is a matrix of its own
    lora: Sizes = NO_ADAPTER  # of a low-rank adapter
    routed: int = 0  # bytes of the experts that are stored with every token
    teacher: Shape | None = None  # of one that is distilled; None also where its configuration is not here

    @classmethod
    def of(cls, architecture: PretrainedConfig, run: RunConfig) -> ModelFacts:
        """Read a model's configuration. ValueError for an adapter of layers that the model has not."""
        model, text = blank_model(architecture), architecture.get_text_config()
        heads = int(text.num_attention_heads)
        key_heads = int(getattr(text, "num_key_value_heads", None) or heads)
        width = int(getattr(text, "head_dim", None) or text.hidden_size // heads)
        lora = run.learner.model.lora
        return cls(
            family=str(architecture.model_type),
            shape=shape_of(model),
            saved=saved_by(architecture, run.learner.model.dtype, run.learner.context_parallel_size),
            cached_numbers=2 * int(text.num_hidden_layers) * key_heads * width,
            key_heads=key_heads,
            width=int(text.hidden_size),
            vocabulary=int(text.vocab_size),
            tied_head=int(text.vocab_size) * int(text.hidden_size) if text.tie_word_embeddings else 0,
            lora=NO_ADAPTER if lora is None else Sizes.of(model, lora),
            routed=routing_bytes(architecture) if run.learner.model.router_replay else 0,
            teacher=_teacher(run),
        )


class Opponent(NamedTuple):
    """A policy that plays the other seat of games: its name, its configuration, its model."""

    name: str
    config: RunConfig
    model: ModelFacts


@dataclass(frozen=True, slots=True)
class Cache:
    """The KV cache of one engine, on each of its devices."""

    nbytes: int
    token_bytes: int

    def sequences(self, tokens: int) -> float:
        """Sequences of so many tokens that fit."""
        return max(self.nbytes, 0) / (self.token_bytes * tokens)


@dataclass(frozen=True, slots=True)
class Process:
    """Processes of one kind. on_gpu: what is not said to be on the host is on a GPU, of each of `devices` as much."""

    name: str
    count: int
    amounts: tuple[Amount, ...]
    on_gpu: bool = False

    def peak(self, on_host: bool, lead: bool = True) -> int:
        """Most bytes at once in the host's memory, or on one GPU, of one process; lead: of the first one."""
        own = [each for each in self.amounts if lead or not each.lead]
        here = [each for each in own if (each.on_host or not self.on_gpu) == on_host]
        always = sum(each.nbytes for each in here if not each.at_times)
        return always + max((each.nbytes for each in here if each.at_times), default=0)

    def host_bytes(self, count: int, lead: bool) -> int:
        """The host's memory for so many of them; lead: the first one is among them."""
        others = self.peak(on_host=True, lead=False)
        return count * others + (self.peak(on_host=True) - others if lead else 0)


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """All processes of a run, and the KV cache of its engine (None: of another kind than vLLM)."""

    processes: tuple[Process, ...]
    cache: Cache | None
    version_bytes: int  # of versions in the memory of every node, beside those of processes
    traffic: Traffic  # between the learner's ranks

    @classmethod
    def of(
        cls, run: RunConfig, model: ModelFacts, gpu_bytes: int, opponents: Sequence[Opponent] = ()
    ) -> MemoryPlan:
        """Plan a run; gpu_bytes: memory of one GPU. opponents: the policies whose versions its workers load."""
        run = _settled(run, model, gpu_bytes)
        sent = sent_bytes(run, model)
        learner = _learner(run, model, sent)
        cache = None if run.replay else _cache(run, model, gpu_bytes, learner.peak(on_host=False))
        met = [amount for each in opponents for amount in _opposing(run, each, gpu_bytes)]
        stored = sent * (2 if _holds(run) else 1)
        processes = learner, *_others(run, model, cache, sent, met)
        return cls(processes, cache, stored, _traffic(run, model))

    def process(self, name: str) -> Process:
        """The processes of this name."""
        return next(each for each in self.processes if each.name == name)


def host_bytes(plans: Sequence[MemoryPlan]) -> int:
    """The host's memory for all processes of a run on one machine, of each of its policies, which share a driver."""
    processes = [each for plan in plans for each in plan.processes]
    drivers = [each.host_bytes(1, lead=True) for each in processes if each.name == DRIVER]
    others = sum(each.host_bytes(each.count, lead=True) for each in processes if each.name != DRIVER)
    return others + max(drivers, default=0)


def sent_bytes(run: RunConfig, model: ModelFacts) -> int:
    """Bytes of a weight version in the host's memory, where engines join even if GPUs send the next ones."""
    lora = run.learner.model.lora
    numbers = model.lora.adapter if lora and lora.sync == "adapter" else model.shape.parameters
    return numbers * SIZES[run.engine.dtype]


def _settled(run: RunConfig, model: ModelFacts, gpu_bytes: int) -> RunConfig:
    """The run with what its learner decides by its memory when it starts."""
    on_gpu = run.learner.model.device == "cuda"
    learner = settled(
        run.learner,
        model.shape,
        model.saved,
        run.rollout.context_tokens,
        gpu_bytes if on_gpu else host_share(run.learner.ranks),
        model.teacher,
    )
    return run.model_copy(update={"learner": learner})


def _traffic(run: RunConfig, model: ModelFacts) -> Traffic:
    """What the learner's ranks exchange."""
    learner, longest = run.learner, run.rollout.context_tokens
    experts, travel = model.shape.experts, Travel()
    if learner.travels:
        sent = experts.sent * experts.layers * slice_tokens(learner, longest)
        travel = Travel(experts.parameters, sent)
    return Traffic.of(
        model.shape.parameters,
        learner.ranks,
        SIZES[learner.model.dtype],
        SIZES[run.engine.dtype],
        learner.model.sum_gradients == "step",
        learner.shards,
        model.lora.adapter,
        0 if model.saved is None else slices_exchanged(learner, model.saved, longest),
        base_bytes(learner, model.shape),
        travel,
        recomputed=bool(learner.model.gradient_checkpointing),
        hidden=hidden_exchanged(learner, model.width, longest),
        teacher=0 if model.teacher is None else model.teacher.parameters,
    )


def stored_tokens(run: RunConfig) -> int:
    """Most tokens of the groups that the replay buffer has at once."""
    slots = (run.buffer.max_lag + 1) * run.buffer.groups_per_step
    return slots * run.rollout.group_size * run.rollout.context_tokens


def row_bytes(model: ModelFacts, tokens: int) -> int:
    """Bytes of so many stored tokens."""
    return (_ROW_BYTES + model.routed) * tokens


def _learner(run: RunConfig, model: ModelFacts, sent: int) -> Process:
    learner, on_gpu = run.learner, run.learner.model.device == "cuda"
    device = learner_amounts(
        learner,
        model.shape,
        model.lora,
        model.saved,
        run.rollout.context_tokens,
        model.teacher,
    )
    device += stage_amounts(learner, run.stages, model.width, model.vocabulary, model.shape, model.lora)
    heads = head_bytes(run.stages, model.width, model.vocabulary)
    host = host_amounts(learner, model.shape, model.lora, sent, heads)
    host += [away_amount(device)] if run.cluster.colocate == "turns" else []
    return Process("learner", learner.ranks, (_STARTED, *device, *host), on_gpu)


def _others(
    run: RunConfig, model: ModelFacts, cache: Cache | None, sent: int, met: Sequence[Amount]
) -> Iterator[Process]:
    if run.replay:
        return
    if run.workers:
        itself = Amount("the process itself", _WORKER_PROCESS, on_host=True)
        amounts = (itself, *_engine(run, model, cache), *met)
        yield Process("rollout worker", run.workers, amounts, run.rollout.gpus_per_worker > 0)
    kept = Amount("groups that are played or waiting", row_bytes(model, stored_tokens(run)), on_host=True)
    yield Process("replay buffer", 1, (Amount("the process itself", _BUFFER_PROCESS, on_host=True), kept))
    yield Process(DRIVER, 1, (_STARTED,))
    if sent:
        stored = [Amount("a version of the weights", sent, on_host=True)]
        if _holds(run):
            stored.append(Amount("the version that deltas are applied to", sent, on_host=True))
        yield Process("object store, on every node", 1, tuple(stored))


def _holds(run: RunConfig) -> bool:
    """Whether the workers of another node than the learner's hold a version together."""
    return run.weights.delta and run.cluster.joins


def _opposing(run: RunConfig, opponent: Opponent, gpu_bytes: int) -> Iterator[Amount]:
    """What a worker's engines of an opponent's versions hold, at most as many as it may have."""
    name, other, model = opponent
    assert run.league is not None
    count = run.league.engines
    for each in _engine(other, model, _cache(other, model, gpu_bytes)):
        what = f"versions of {name} in {count} engines: {each.what}"
        yield Amount(what, count * each.nbytes, on_host=each.on_host)


def _engine(run: RunConfig, model: ModelFacts, cache: Cache | None) -> Iterator[Amount]:
    engine, on_gpu = run.engine, run.rollout.gpus_per_worker > 0
    yield Amount(f"weights, {engine.dtype}", engine_weights(run, model))
    if not isinstance(engine, VllmSettings) or cache is None:
        return
    yield Amount("KV cache", cache.nbytes)
    yield Amount("vLLM's processes", _VLLM_PROCESSES, on_host=True)
    if model.routed:
        held = max(cache.nbytes, 0) // cache.token_bytes * model.routed
        yield Amount("experts of the tokens in the KV cache", held, on_host=True)
    if on_gpu:
        yield Amount("vLLM's activations, graphs, context", VLLM_WORKING)
        return
    if model.tied_head:
        yield Amount("head, packed once more", SIZES[engine.dtype] * model.tied_head)


def engine_weights(run: RunConfig, model: ModelFacts) -> int:
    """Bytes of the weights that an engine has on each of its devices."""
    engine, on_gpu = run.engine, run.rollout.gpus_per_worker > 0
    spans = engine.shards if on_gpu and isinstance(engine, VllmSettings) else 1
    return SIZES[engine.dtype] * model.shape.parameters // spans


def _cache(run: RunConfig, model: ModelFacts, gpu_bytes: int, learner_bytes: int = 0) -> Cache | None:
    """learner_bytes: what the learner holds at most on its GPU, which the engines of "ipc" share."""
    engine, on_gpu = run.engine, run.rollout.gpus_per_worker > 0
    if not isinstance(engine, VllmSettings):
        return None
    size = SIZES[engine.dtype]
    # A key head is not divided: with more devices than heads some hold the same one.
    heads = -(-model.key_heads // engine.tensor_parallel_size)
    held = model.cached_numbers // model.key_heads * heads // engine.pipeline_parallel_size
    own = int(engine.memory_fraction * gpu_bytes)
    if run.weights.transfer == "ipc":
        own = (int((1 - UNTOLD_SHARE) * gpu_bytes) - learner_bytes) // run.rollout.workers
    left = own - engine_weights(run, model) - VLLM_WORKING
    asked = engine.kv_cache_bytes(on_gpu)
    return Cache(left if asked is None else asked, size * held)


def shape_in(folder: str, trusted: bool) -> Shape:
    """Of the model in a folder, by its configuration alone."""
    return shape_of(blank_model(pretrained(AutoConfig, folder, trusted), trusted))


def _teacher(run: RunConfig) -> Shape | None:
    """Of the recipe's teacher, by the configuration on this machine."""
    distill = run.learner.algorithm.distill
    if distill is None:
        return None
    try:
        folder = fetch(model_of(distill.teacher), download=False)
        return shape_in(folder, run.learner.model.trust_remote_code)
    except (ConfigError, OSError, ValueError):  # preflight says what is wrong with it
        return None
