"""How large a job is: tokens of a step, optimizer steps, passes over the data, evaluation, disk, nodes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from functools import partial

from deploy.assembly.memory_plan import DRIVER, MemoryPlan, ModelFacts, Process, row_bytes
from deploy.config.config import RunConfig
from deploy.config.derived import longest_episode
from deploy.config.environments import Environment
from deploy.config.resources import Reservation, reservations
from envs import registry
from learner.training.memory_estimate import checkpoint_bytes, head_bytes, row_tokens

Counts = tuple[
    int | None, int | None
]  # tasks of training and of evaluation; None where every seed is another one


@dataclass(frozen=True, slots=True)
class DataUse:
    """What a run plays of one environment."""

    name: str
    groups: float  # of the whole run, by the environment's share
    rows: int | None  # of its list of tasks; None where every seed is another task
    evaluation_tasks: int
    longest: int  # most tokens that an episode samples

    @property
    def passes(self) -> float | None:
        """Times that a row is played; None without a list of rows."""
        return None if not self.rows else self.groups / self.rows


@dataclass(frozen=True, slots=True)
class JobSize:
    """Figures of a job. Tokens are upper bounds: every episode as long as it may be."""

    episodes: int  # of a step
    sampled: int  # tokens of a step
    processed: int  # input tokens of a step's forward pass, prompts included
    steps: int
    optimizer_steps: int
    data: tuple[DataUse, ...]

    @classmethod
    def of(cls, config: RunConfig, counts: Sequence[Counts]) -> JobSize:
        """The figures of a recipe; counts: of each environment."""
        rollout, buffer, context = config.rollout, config.buffer, config.rollout.context_tokens
        data = tuple(map(partial(_use, config), config.environments, counts))
        turns = [1 if each.agent.memory == "full" else each.limits.max_turns for each in config.environments]
        episodes = (buffer.groups_per_step + buffer.reuse.groups) * rollout.group_size
        return cls(
            episodes=episodes,
            sampled=episodes * max(each.longest for each in data),
            processed=episodes * context * max(turns),
            steps=config.steps,
            optimizer_steps=config.learner.algorithm.policy_steps(config.steps),
            data=data,
        )


def rows_of_rank(config: RunConfig, size: JobSize) -> int:
    """Most packed rows of a step that a rank of the learner has: as many as its share of the tokens fills."""
    tokens = row_tokens(config.learner, config.rollout.context_tokens)
    return -(-size.processed // (tokens * config.learner.shares))


def row_counts(environment: Environment) -> Counts:
    """Tasks with training's and with evaluation's options; None where every seed is another one."""
    trained = registry.task_count(environment.id, environment.options)
    return trained, registry.task_count(environment.id, environment.evaluated)


def _use(config: RunConfig, environment: Environment, counts: Counts) -> DataUse:
    whole = sum(each.share for each in config.environments)
    groups = config.steps * config.buffer.groups_per_step * environment.share / whole
    rows, held_out = counts
    tasks = config.evaluation.tasks if held_out is None else min(config.evaluation.tasks, held_out)
    turns, tokens = environment.limits.max_turns, environment.sampling.max_tokens
    longest = longest_episode(turns, tokens, config.rollout.context_tokens, environment.agent)
    return DataUse(environment.name, groups, rows, tasks, longest)


@dataclass(frozen=True, slots=True)
class DiskUse:
    """Bytes on the disk of the run folder, at most."""

    checkpoint: int
    checkpoints: int  # those kept, and one that is being written
    rows: int  # of all steps, or the bound that the recipe sets

    @classmethod
    def of(cls, config: RunConfig, model: ModelFacts, size: JobSize) -> DiskUse:
        """The disk that a recipe needs."""
        heads = head_bytes(config.stages, model.width, model.vocabulary)
        one = checkpoint_bytes(config.learner, model.shape, model.lora, heads)
        count = min(config.checkpoint.keep, 1 + config.steps // config.checkpoint.every_steps) + 1
        rows = row_bytes(model, size.processed) * size.steps
        if config.buffer.disk_gib is not None:
            rows = min(rows, int(config.buffer.disk_gib * 2**30))
        return cls(one, one * count, rows)

    @classmethod
    def together(cls, uses: Sequence[DiskUse]) -> DiskUse:
        """That of all policies of a run."""
        return cls(*(sum(column) for column in zip(*map(astuple, uses), strict=True)))

    @property
    def total(self) -> int:
        """Checkpoints and rows together."""
        return self.checkpoints + self.rows


@dataclass(frozen=True, slots=True)
class Node:
    """What a node of the cluster carries: actors by name, and what they reserve and hold."""

    actors: tuple[tuple[str, int], ...]
    gpus: float
    cpus: float
    host_bytes: int


@dataclass(frozen=True, slots=True, eq=False)
class _Actors:
    """Actors of one kind, of one policy."""

    name: str
    reserved: Reservation
    plan: MemoryPlan  # of the policy
    process: Process | None  # None: its memory is not told

    @property
    def gpus(self) -> float:
        """GPUs of each."""
        return self.reserved.each.get("GPU", 0.0)


def nodes(rings: Sequence[tuple[RunConfig, MemoryPlan]], gpus_per_node: int) -> list[Node]:
    """Nodes that the actors of all policies of a run fit on, the first that has room for each; without GPUs one.

    rings: of each policy. An engine of more GPUs than a node has takes several nodes: its actor is on the first.
    ValueError where nodes have none.
    """
    kinds = sorted(_kinds(rings), key=lambda kind: -kind.gpus)
    left: list[float] = []
    placed: list[Counter[_Actors]] = []
    for kind in kinds:
        if kind.gpus and gpus_per_node < 1:
            raise ValueError(f"a {kind.name} asks for {kind.gpus:g} GPUs, but nodes have none")
        for _ in range(kind.reserved.count):
            place = next((index for index, free in enumerate(left) if free >= kind.gpus - 1e-6), len(left))
            if place == len(left):
                left.append(float(gpus_per_node))
                placed.append(Counter())
            placed[place][kind] += 1
            left[place] -= kind.gpus
            while left[-1] < -1e-6:  # more than a node has: the rest is on the next
                beyond, left[-1] = -left[-1], 0.0
                left.append(gpus_per_node - beyond)
                placed.append(Counter())
    first = {kind: next(n for n, actors in enumerate(placed) if kind in actors) for kind in kinds}
    unreserved = _unreserved(rings)
    found = []
    for number, actors in enumerate(placed):
        leads = {kind for kind in actors if first[kind] == number}
        gpus = round(gpus_per_node - left[number], 4)
        found.append(_node(actors, leads, gpus, 0 if number else unreserved))
    return found


def _kinds(rings: Sequence[tuple[RunConfig, MemoryPlan]]) -> Iterator[_Actors]:
    for config, plan in rings:
        processes = {each.name: each for each in plan.processes}
        for each in reservations(config):
            name = f"{each.part} of {config.policy}" if len(rings) > 1 else each.part
            if each.count:
                yield _Actors(name, each, plan, processes.get(each.part))


def _unreserved(rings: Sequence[tuple[RunConfig, MemoryPlan]]) -> int:
    """The host's memory for what reserves nothing and is on the first node: one driver, and replay buffers."""
    driver, buffers = 0, 0
    for config, plan in rings:
        reserved = {each.part for each in reservations(config)}
        for each in plan.processes:
            if each.name == DRIVER:
                driver = each.host_bytes(1, lead=True)
            elif each.name == "replay buffer" and each.name not in reserved:
                buffers += each.host_bytes(1, lead=True)
    return driver + buffers


def _node(actors: Counter[_Actors], leads: set[_Actors], gpus: float, unreserved: int) -> Node:
    """leads: kinds whose first actor is here; gpus: that are taken here; unreserved: bytes of what reserves nothing."""
    # Of every policy that has an actor here, the versions too.
    host = unreserved + sum({id(kind.plan): kind.plan.version_bytes for kind in actors}.values())
    for kind, count in actors.items():
        if kind.process is not None:
            host += kind.process.host_bytes(count, kind in leads)
    cpus = sum(count * kind.reserved.each.get("CPU", 0.0) for kind, count in actors.items())
    named = tuple((kind.name, count) for kind, count in actors.items())
    return Node(named, gpus, round(cpus, 4), host)
