"""Data types shared by rollout and learner: task, turn, trajectory, group.

All types are frozen and hold what was observed, sampled and earned. Returns, advantages, lags and masks are derived
where they are used, so that any algorithm can run on stored rows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rollout.wire.equality import all_equal
from rollout.wire.policies import POLICY, Opponent

Int32Array = NDArray[np.int32]
Float32Array = NDArray[np.float32]
UInt8Array = NDArray[np.uint8]
COST = "costs/"  # begins the names of costs among a turn's named numbers
EnvironmentKey = tuple[str, str]  # id and options of an environment, as in its tasks


class EndReason(StrEnum):
    """Why an episode ended. Every episode has exactly one; FAILED and CANCELLED are never trained on."""

    TERMINATED = "terminated"  # the environment reached a final state
    TRUNCATED = "truncated"  # a limit of turns or time ended it: the state was not final
    CONTEXT_OVERFLOW = "context_overflow"  # no room left in the model's context for another turn
    MALFORMED = "malformed"  # the environment could not parse the agent's action and ended the episode
    FAILED = "failed"  # infrastructure: an exception or a limit in environment or engine, never a reward
    CANCELLED = "cancelled"  # the run ended, or the group was given up


class DropReason(StrEnum):
    """Why a group will never be trained. The values are stored in ledgers."""

    NONFINITE = "nonfinite"  # numbers, loss or gradient of its batch are not finite
    FAILED = "failed"  # fewer than two episodes survived infrastructure failures
    EQUAL_REWARDS = "uniform"  # dynamic sampling: all episodes earned the same (Yu et al. 2025, DAPO)
    CRASHED = "crashed"  # it makes its workers crash
    CANCELLED = "cancelled"  # given up when the run ended


@dataclass(frozen=True, slots=True)
class Task:
    """One instance to solve: an environment, its options, and the seed that fixes the instance.

    `options` is canonical JSON, so that a task is hashable and can be stored in a column.
    """

    env_id: str
    seed: int
    options: str = "{}"

    @classmethod
    def of(cls, env_id: str, seed: int, options: Mapping[str, Any] | None = None) -> Task:
        return cls(env_id, seed, json.dumps(dict(options or {}), sort_keys=True))

    @property
    def environment(self) -> EnvironmentKey:
        """What all tasks of one environment have in common."""
        return self.env_id, self.options

    @property
    def kwargs(self) -> dict[str, Any]:
        """Keyword arguments of the environment."""
        return dict(json.loads(self.options))


@dataclass(frozen=True, slots=True)
class Slot:
    """Permission to sample one group: held from `reserve` until its batch is released, or the group is dropped.

    group_id counts groups in the order of issue and never changes. A group that is reassigned to another worker, or
    reissued after a crash, gets a higher attempt.
    """

    group_id: int
    attempt: int
    task: Task
    version: int  # weight version the learner had published when the group was issued
    policy: str = (
        POLICY  # the group belongs to this policy: it samples the group's tokens and learns from them
    )
    opponent: Opponent | None = (
        None  # who plays the other seat; None: the environment has none, or plays it itself
    )


class StaleSlot(ValueError):
    """The attempt does not hold the slot (any more): the group was committed, dropped, reassigned or reissued."""

    @classmethod
    def of(cls, slot: Slot) -> StaleSlot:
        """The error for this slot."""
        return cls(
            f"group {slot.group_id}, attempt {slot.attempt}, holds no slot: "
            "it was committed, dropped, reassigned or reissued"
        )


@dataclass(frozen=True, slots=True)
class Assignment:
    """What `reserve` returns to a worker: a slot, and the turns that earlier attempts have played."""

    slot: Slot
    turns: pa.RecordBatch | None  # rows of JOURNAL_SCHEMA; None: no turn was played
    losses: int = 0  # workers that were lost while they held the group


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of an agent in its environment; it holds only the tokens that it ADDS to its segment.

    A segment's token sequence is the concatenation of prompt_ids and action_ids of its turns, in order.
    """

    turn: int  # number in the episode, from 0
    segment: int  # tokens with one unbroken history; a rewritten history opens the next segment
    observation: str  # chat messages as JSON, for people
    action: str  # the sampled text, for people; training uses action_ids
    prompt_ids: Int32Array  # [P] tokens added before sampling: observation and template
    action_ids: Int32Array  # [A] tokens sampled
    behavior_logprobs: Float32Array  # [A] log-probabilities recorded while sampling, nats
    versions: Int32Array  # [A] weight version that sampled each token
    reward: float
    finish_reason: str  # "stop" or "length", as the engine says
    env_seconds: float = 0.0
    engine_seconds: float = 0.0
    seat: int | None = None  # which player moved in self-play: 0 whom rewards are for, 1 the other
    named_rewards: str | None = None  # JSON, name -> number: components of the reward; costs as "costs/NAME"
    # [P+A, B] bytes of the experts that the engine chose for the token BEFORE each of these, which is what the token is
    # predicted from (`rollout.engines.engine.as_bytes`); zeros for the first of a segment. None: none were recorded.
    routed_experts: UInt8Array | None = None


@dataclass(frozen=True, slots=True)
class TurnEnd:
    """How an episode ended, known with its last turn."""

    end_reason: EndReason
    success: bool | None  # the environment's own verdict, if it gives one


@dataclass(frozen=True, slots=True)
class PartialEpisode:
    """The durable turns of an episode: a prefix without gaps, from which it can be resumed."""

    turns: tuple[Turn, ...]
    end: TurnEnd | None  # None: unfinished
    snapshot: bytes | None  # the environment's state after the last of `turns`, if it provides one


@dataclass(frozen=True, slots=True)
class Trajectory:
    """One episode."""

    group_id: int
    attempt: int
    index: int  # among its siblings, 0..G-1
    task: Task
    turns: tuple[Turn, ...]
    end_reason: EndReason
    success: bool | None = None  # the environment's own verdict, if it gives one
    error: str | None = None  # traceback, for FAILED
    worker: str = ""

    @property
    def reward(self) -> float:
        """Sum of the turns' rewards."""
        return float(sum(turn.reward for turn in self.turns))

    @property
    def reward_magnitude(self) -> float:
        """Sum of the turns' absolute rewards, which the rounding of their sum depends on (wire/equality.py)."""
        return float(sum(abs(turn.reward) for turn in self.turns))

    @property
    def named_rewards(self) -> dict[str, float]:
        """Sums of the turns' named rewards; empty if the environment names none."""
        return {name: sum(values) for name, values in self._named().items()}

    @property
    def named_magnitudes(self) -> dict[str, float]:
        """Sums of the absolute values of the turns' named rewards."""
        return {name: sum(map(abs, values)) for name, values in self._named().items()}

    @property
    def costs(self) -> dict[str, list[float]]:
        """Each named cost, a number for every turn, 0 where the turn says none; empty if the environment has none."""
        numbers = [json.loads(turn.named_rewards or "{}") for turn in self.turns]
        names = dict.fromkeys(name for named in numbers for name in named if name.startswith(COST))
        return {name.removeprefix(COST): [named.get(name, 0.0) for named in numbers] for name in names}

    def _named(self) -> dict[str, list[float]]:
        """Values of each named reward, in turn order."""
        found: dict[str, list[float]] = {}
        for turn in self.turns:
            for name, value in json.loads(turn.named_rewards or "{}").items():
                if not name.startswith(COST):
                    found.setdefault(name, []).append(value)
        return found

    @property
    def trainable(self) -> bool:
        """Whether the episode may enter a loss or a baseline: infrastructure failures never do."""
        return bool(self.turns) and self.end_reason not in (EndReason.FAILED, EndReason.CANCELLED)

    @property
    def num_sampled(self) -> int:
        """Tokens sampled over the whole episode."""
        return sum(len(turn.action_ids) for turn in self.turns)

    def unrouted(self) -> Trajectory:
        """The episode without its tokens' experts: it is not learned from, or by another model than sampled it."""
        return replace(self, turns=tuple(replace(turn, routed_experts=None) for turn in self.turns))


@dataclass(frozen=True, slots=True)
class Group:
    """Sibling episodes of one task; the unit of reservation, storage and training."""

    slot: Slot
    trajectories: tuple[Trajectory, ...]
    reuse: int = 0  # number of this reuse; 0: fresh

    @property
    def trainable(self) -> tuple[Trajectory, ...]:
        """The episodes that may enter a loss."""
        return tuple(t for t in self.trajectories if t.trainable)

    @property
    def equal_rewards(self) -> bool:
        """Whether all trainable episodes earned the same, so that none is better than another."""
        episodes = self.trainable
        return all_equal([t.reward for t in episodes], [t.reward_magnitude for t in episodes])
