"""The words both sides of the ring share: task, step, trajectory, group.

Everything here is frozen and holds facts only: what was asked, what was sampled, what came back. Rewards-to-go,
advantages, lags and masks are derived where they are used, so that any algorithm can be run again over stored rows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rollout.wire.equality import all_equal

Int32Array = NDArray[np.int32]
Float32Array = NDArray[np.float32]


class EndReason(StrEnum):
    """Why an episode ended. Every episode has exactly one; only FAILED and CANCELLED are never trained on."""

    TERMINATED = "terminated"  # the environment reached a final state
    TRUNCATED = "truncated"  # a turn or time limit cut it: the state was not final
    CONTEXT_OVERFLOW = "context_overflow"  # no room left in the model's context for another turn
    MALFORMED = "malformed"  # the environment could not read the agent's action and ended the episode
    FAILED = "failed"  # infrastructure: an exception or a limit in environment or engine, never a reward
    CANCELLED = "cancelled"  # the run ended or the group was given up while it ran


class DropReason(StrEnum):
    """Why a group will never be trained."""

    NONFINITE = "nonfinite"  # its batch could not be learned from: numbers, loss or gradient not finite
    FAILED = "failed"  # fewer than two episodes survived infrastructure failures
    UNIFORM = (
        "uniform"  # all episodes earned the same of the environment: none is better (Yu et al. 2025, DAPO)
    )
    CRASHED = "crashed"  # workers were lost while they played it, and it is the cause
    CANCELLED = "cancelled"  # given up when the run ended


@dataclass(frozen=True, slots=True)
class Task:
    """One thing to solve: an environment, its options, and the seed that fixes the instance.

    `options` is canonical JSON so that a task is hashable and can be a column.
    """

    env_id: str
    seed: int
    options: str = "{}"

    @classmethod
    def of(cls, env_id: str, seed: int, options: Mapping[str, Any] | None = None) -> Task:
        return cls(env_id, seed, json.dumps(dict(options or {}), sort_keys=True))

    @property
    def kwargs(self) -> dict[str, Any]:
        """The environment's keyword arguments."""
        return dict(json.loads(self.options))


@dataclass(frozen=True, slots=True)
class Slot:
    """Leave to sample one group: held from `reserve` until its batch is released (or the group is dropped).

    group_id is the group's place in the order of issue and never changes; a group that is given to another worker, or
    issued again after a crash, gets a higher attempt.
    """

    group_id: int
    attempt: int
    task: Task
    version: int  # weight version the learner had published when the slot was first given out


class StaleSlot(ValueError):
    """The slot is not held by this attempt (any more): the group was handed on, rolled back, or ended otherwise."""

    @classmethod
    def of(cls, slot: Slot) -> StaleSlot:
        """Names the slot."""
        return cls(
            f"group {slot.group_id}, attempt {slot.attempt}, holds no slot: "
            "it was handed in, dropped, handed on or issued again"
        )


@dataclass(frozen=True, slots=True)
class Assignment:
    """What `reserve` gives a worker: a slot, and what earlier attempts have played of it."""

    slot: Slot
    turns: pa.RecordBatch | None  # rows of JOURNAL_SCHEMA; None where nothing was played
    losses: int = 0  # workers that were lost while they held the group


@dataclass(frozen=True, slots=True)
class Step:
    """One agent turn; it holds only the tokens it ADDS to its segment.

    A segment's token sequence is the concatenation of prompt_ids and action_ids of its steps, in order.
    """

    turn: int
    segment: int  # a run of tokens with one unbroken history; a rewritten history opens the next segment
    observation: str  # what the environment said, for people (chat messages as JSON)
    action: str  # the sampled text, for people; training uses action_ids
    prompt_ids: Int32Array  # [P] tokens added before sampling: observation and template
    action_ids: Int32Array  # [A] tokens sampled
    behavior_logprobs: Float32Array  # [A] log-probabilities recorded while sampling, nats
    versions: Int32Array  # [A] weight version that sampled each token
    reward: float
    finish_reason: str  # "stop" or "length", as the engine says
    env_seconds: float = 0.0
    engine_seconds: float = 0.0
    seat: int | None = (
        None  # in a game the agent plays with itself, who moved: 0 whom rewards are for, 1 the other
    )
    named_rewards: str | None = None  # JSON, name -> number: what the environment says its reward is made of


@dataclass(frozen=True, slots=True)
class TurnEnd:
    """How an episode ended, known with its last turn."""

    end_reason: EndReason
    success: bool | None  # the environment's own verdict, where it has one


@dataclass(frozen=True, slots=True)
class EpisodeSoFar:
    """The durable turns of an episode: a prefix without gaps, from which it can go on."""

    steps: tuple[Step, ...]
    end: TurnEnd | None  # None: unfinished
    snapshot: bytes | None  # the environment's state after the last of `steps`, where it offers one


@dataclass(frozen=True, slots=True)
class Trajectory:
    """One episode as it happened."""

    group_id: int
    attempt: int
    index: int  # place in the group, 0..G-1
    task: Task
    steps: tuple[Step, ...]
    end_reason: EndReason
    success: bool | None = None  # the environment's own verdict, where it has one
    error: str | None = None  # traceback, for FAILED
    worker: str = ""

    @property
    def reward(self) -> float:
        """Sum of the step rewards."""
        return float(sum(step.reward for step in self.steps))

    @property
    def reward_magnitude(self) -> float:
        """Sum of the absolute step rewards, on which the rounding of their sum depends (wire/equality.py)."""
        return float(sum(abs(step.reward) for step in self.steps))

    @property
    def named_rewards(self) -> dict[str, float]:
        """Sums of the steps' named rewards; empty where the environment names none."""
        return {name: sum(values) for name, values in self._named().items()}

    @property
    def named_magnitudes(self) -> dict[str, float]:
        """Sums of the absolute values of the steps' named rewards."""
        return {name: sum(map(abs, values)) for name, values in self._named().items()}

    def _named(self) -> dict[str, list[float]]:
        """What each step that names a reward pays of it."""
        found: dict[str, list[float]] = {}
        for step in self.steps:
            for name, value in json.loads(step.named_rewards or "{}").items():
                found.setdefault(name, []).append(value)
        return found

    @property
    def trainable(self) -> bool:
        """Whether the episode may enter a loss or a baseline: infrastructure failures never do."""
        return bool(self.steps) and self.end_reason not in (EndReason.FAILED, EndReason.CANCELLED)

    @property
    def num_sampled(self) -> int:
        """Tokens sampled over the whole episode."""
        return sum(len(step.action_ids) for step in self.steps)


@dataclass(frozen=True, slots=True)
class Group:
    """Sibling episodes of one task; the unit of reservation, storage and training."""

    slot: Slot
    trajectories: tuple[Trajectory, ...]
    reuse: int = 0  # which reuse of it this is; 0: fresh

    @property
    def trainable(self) -> tuple[Trajectory, ...]:
        """The episodes a loss may see."""
        return tuple(t for t in self.trajectories if t.trainable)

    @property
    def uniform(self) -> bool:
        """Whether the environment paid all trainable episodes the same: none of them is better than another."""
        episodes = self.trainable
        return all_equal([t.reward for t in episodes], [t.reward_magnitude for t in episodes])
