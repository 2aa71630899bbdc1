"""The rollout worker: plays the groups the exchange gives out, on one engine.

    while slot := await exchange.reserve():
        await exchange.add(slot, encode(await run_group(slot, ...)))

`concurrent_groups` such loops run at once. Each waits for the exchange (a free slot: freed when the learner's new
weights have reached every engine) and for the engine, and for nothing else.
"""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field

from rollout.agent import Agent
from rollout.engine import Engine, derive_seed
from rollout.episode import Limits, Place
from rollout.group import concurrently, play, run_group
from rollout.pool import EnvironmentPool
from rollout.wire.schema import encode
from rollout.wire.store import EpisodeRow
from rollout.wire.trajectory import DropReason, EndReason, Group, Slot, Task, Trajectory

_EVALUATION = 1  # a third part of the seed: evaluation episodes never share a training episode's sampling


class RolloutSettings(BaseModel):
    """How episodes are played, and by how many workers."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    workers: int = Field(1, gt=0, description="rollout workers, each with an engine of its own")
    cpus_per_worker: float = Field(1.0, ge=0, description="CPUs a worker claims from the cluster")
    gpus_per_worker: float = Field(
        0.0, ge=0, description="GPUs a worker claims from the cluster; 0: engine on CPU"
    )
    group_size: int = Field(8, gt=0, description="sibling episodes of one task")
    concurrent_groups: int = Field(32, gt=0, description="groups one worker plays at the same time")
    context_tokens: int = Field(1024, gt=1, description="longest conversation, prompt and answers, in tokens")
    max_turns: int = Field(100, gt=0, description="turns after which an episode is truncated")
    episode_seconds: float = Field(600.0, gt=0, description="wall clock after which an episode has failed")

    @property
    def limits(self) -> Limits:
        return Limits(self.max_turns, self.episode_seconds)

    @property
    def needed(self) -> int:
        """Episodes that must survive infrastructure failures: a baseline needs a sibling."""
        return min(self.group_size, 2)


class GroupExchange(Protocol):
    """What a worker needs of the exchange, local or remote."""

    async def reserve(self, worker: str) -> Slot | None: ...

    async def add(self, slot: Slot, batch: pa.RecordBatch, episodes: Sequence[EpisodeRow]) -> None: ...

    async def drop(
        self, slot: Slot, reason: DropReason, error: str = "", episodes: Sequence[EpisodeRow] = ()
    ) -> None: ...


@dataclass(slots=True)
class _Tally:
    """Sums over the episodes that ended, training and evaluation alike."""

    tokens_sampled: int = 0
    tokens_prompt: int = 0  # added by environment and template; a prefix is counted once
    turns: int = 0
    env_seconds: float = 0.0
    ended: Counter[EndReason] = field(default_factory=Counter)

    def count(self, trajectory: Trajectory) -> None:
        self.ended[trajectory.end_reason] += 1
        self.turns += len(trajectory.steps)
        for step in trajectory.steps:
            self.tokens_sampled += len(step.action_ids)
            self.tokens_prompt += len(step.prompt_ids)
            self.env_seconds += step.env_seconds


class RolloutWorker:
    """Engine, agent and environments under one name. The engine is the agent's; whoever hosts the worker syncs it."""

    def __init__(
        self,
        name: str,
        engine: Engine,
        agent: Agent,
        exchange: GroupExchange,
        settings: RolloutSettings,
        run_seed: int,
        pool: EnvironmentPool | None = None,
    ) -> None:
        self.name = name
        self.engine = engine
        self._agent = agent
        self._exchange = exchange
        self._settings = settings
        self._run_seed = run_seed
        self._pool = EnvironmentPool() if pool is None else pool
        self._tally = _Tally()
        self._groups: Counter[str] = Counter(played=0, dropped=0)

    async def run(self) -> None:
        """Play groups until the exchange says that the run is over; cancelled, it leaves its slots to the ledger."""
        await concurrently(self._play_groups() for _ in range(self._settings.concurrent_groups))

    async def evaluate(self, tasks: Sequence[Task]) -> list[Trajectory]:
        """One episode a task, as many at once as training plays, in the order of `tasks`.

        Sampling depends on (run seed, task seed, which repetition of the task) alone, so two evaluations differ by
        the weights only.
        """
        gate = asyncio.Semaphore(self._settings.concurrent_groups * self._settings.group_size)
        repetitions: Counter[Task] = Counter()
        places = []
        for task in tasks:
            index = repetitions[task]
            repetitions[task] += 1
            seed = derive_seed(self._run_seed, task.seed, index, _EVALUATION)
            places.append(Place(Slot(task.seed, 0, task, self.engine.version), index, seed, self.name))
        return await concurrently(self._evaluate_one(place, gate) for place in places)

    def counters(self) -> dict[str, float]:
        """Sums since the worker was made.

        engine_seconds is wall time with at least one request in the engine; env_seconds is time inside environments.
        """
        tally = self._tally
        return {
            "tokens_sampled": tally.tokens_sampled,
            "tokens_prompt": tally.tokens_prompt,
            "turns": tally.turns,
            "episodes": tally.ended.total(),
            "groups": self._groups["played"],
            "groups_dropped": self._groups["dropped"],
            "engine_seconds": self._agent.engine_clock.seconds,
            "env_seconds": tally.env_seconds,
        } | {f"episodes_{reason}": tally.ended[reason] for reason in EndReason}

    def close(self) -> None:
        """Close the idle environment replicas; the engine is closed by whoever started it."""
        self._pool.close()

    async def _play_groups(self) -> None:
        settings = self._settings
        while slot := await self._exchange.reserve(self.name):
            group = await run_group(
                slot, self._pool, self._agent, settings.group_size, settings.limits, self._run_seed, self.name
            )
            await self._hand_over(group)

    async def _hand_over(self, group: Group) -> None:
        for trajectory in group.trajectories:
            self._tally.count(trajectory)
        rows = [EpisodeRow.of(trajectory) for trajectory in group.trajectories]
        if len(group.trainable) >= self._settings.needed:
            await self._exchange.add(group.slot, encode(group), rows)
            self._groups["played"] += 1
        else:
            errors = [trajectory.error for trajectory in group.trajectories if trajectory.error]
            await self._exchange.drop(group.slot, DropReason.FAILED, errors[0] if errors else "", rows)
            self._groups["dropped"] += 1

    async def _evaluate_one(self, place: Place, gate: asyncio.Semaphore) -> Trajectory:
        async with gate:
            trajectory = await play(place, self._pool, self._agent, self._settings.limits)
        self._tally.count(trajectory)
        return trajectory


def as_groups(trajectories: Sequence[Trajectory]) -> list[Group]:
    """Evaluation episodes as groups, for storage: the episodes of one task are siblings."""
    siblings: dict[tuple[int, Task], list[Trajectory]] = defaultdict(list)
    for trajectory in trajectories:
        siblings[trajectory.group_id, trajectory.task].append(trajectory)
    return [
        Group(Slot(group_id, 0, task, _first_version(members)), tuple(members))
        for (group_id, task), members in siblings.items()
    ]


def _first_version(trajectories: Sequence[Trajectory]) -> int:
    return min((int(t.steps[0].versions[0]) for t in trajectories if t.steps), default=0)
