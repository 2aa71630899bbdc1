"""Recorded episodes of a replica, for comparison."""

from __future__ import annotations

import json
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

from envs.base import named_rewards
from envs.hosting.host import EnvironmentFailed, Outcome, Replica
from envs.registry import Player


class EnvRaised(RuntimeError):
    """An environment raised, or returned something that cannot be used."""

    def __init__(self, where: str, error: Exception) -> None:
        super().__init__(f"{where}: {shown(repr(error))}")
        self.where = where
        self.error = error


@dataclass(slots=True)
class RecordedTurn:
    """The outcome of one step, and a copy of it: the environment may keep changing the object it returned."""

    action: str
    original: Outcome
    outcome: Outcome = field(init=False)
    seconds: float
    snapshot: bytes | None

    def __post_init__(self) -> None:
        self.outcome = deepcopy(self.original)

    @property
    def ended(self) -> bool:
        return bool(self.outcome[2]) or bool(self.outcome[3])


@dataclass(slots=True)
class Record:
    """A recorded episode, from its reset to its end or to the last turn requested."""

    seed: int
    opening: Any
    reset_seconds: float
    turns: list[RecordedTurn] = field(default_factory=list)

    @property
    def actions(self) -> list[str]:
        return [turn.action for turn in self.turns]

    @property
    def reward(self) -> float:
        return float(sum(float(turn.outcome[1]) for turn in self.turns))

    def where(self, turn: int) -> str:
        """Describe a position in the episode: 0 is the reset, k the k-th step."""
        if turn == 0:
            return f"reset, seed {self.seed}"
        action = f", action {shown(repr(self.turns[turn - 1].action))}" if turn <= len(self.turns) else ""
        return f"step {turn}, seed {self.seed}{action}"


class Script:
    """A player that repeats recorded actions."""

    def __init__(self, actions: Sequence[str]) -> None:
        self._actions = iter(actions)

    def act(self, observation: Any) -> str:
        return next(self._actions)


async def play(
    replica: Replica,
    seed: int,
    player: Player,
    turns: int,
    between: Callable[[], Awaitable[object]] | None = None,
) -> Record:
    """Reset with a seed and play at most `turns` turns; `between` is awaited before each. Raises EnvRaised."""
    began = time.perf_counter()
    with env_call(f"reset, seed {seed}"):
        opening = await replica.reset(seed)
    record = Record(seed, deepcopy(opening), time.perf_counter() - began)
    await resume(replica, record, opening, player, turns, between)
    return record


async def resume(
    replica: Replica,
    record: Record,
    observation: Any,
    player: Player,
    turns: int,
    between: Callable[[], Awaitable[object]] | None = None,
) -> None:
    """Extend a record, from the current state of the replica."""
    for _ in range(turns):
        if between is not None:
            await between()
        where = f"step {len(record.turns) + 1}, seed {record.seed}"
        with env_call(f"the player, {where}"):
            action = player.act(observation)
        record.turns.append(await step(replica, action, where))
        if record.turns[-1].ended:
            return
        observation = record.turns[-1].original[0]


async def step(replica: Replica, action: str, where: str) -> RecordedTurn:
    """One step. Raises EnvRaised, also for a result of the wrong form (the replica checks it)."""
    began = time.perf_counter()
    with env_call(f"{where}, action {shown(repr(action))}"):
        original = await replica.step(action)
        seconds = time.perf_counter() - began
        ended = bool(original[2]) or bool(original[3])
        return RecordedTurn(action, original, seconds=seconds, snapshot=None if ended else replica.snapshot())


def first_diff(one: Record, other: Record) -> int | None:
    """The first position at which two records differ (0: the reset, k: the k-th step), or None."""
    if json.dumps(one.opening) != json.dumps(other.opening):
        return 0
    for number, (turn, twin) in enumerate(zip_longest(one.turns, other.turns), start=1):
        if turn is None or twin is None or _facts(turn.outcome) != _facts(twin.outcome):
            return number
    return None


@contextmanager
def env_call(where: str) -> Iterator[None]:
    """Wrap calls into an environment: user code may raise anything, which becomes EnvRaised."""
    try:
        yield
    except EnvironmentFailed:
        raise
    except Exception as error:
        raise EnvRaised(where, error) from error


def shown(text: str, max_length: int = 80) -> str:
    """A text on one line, truncated for a message."""
    line = " ".join(text.split())
    return line if len(line) <= max_length else f"{line[:max_length]}..."


def _facts(outcome: Outcome) -> str:
    """The parts of an outcome that Manta uses, as text, so that NaN equals NaN."""
    observation, reward, terminated, truncated, info = outcome
    verdicts = [info.get("success"), info.get("malformed")]
    known = [verdict if verdict is None else bool(verdict) for verdict in verdicts]
    return json.dumps(
        [observation, float(reward), bool(terminated), bool(truncated), known, named_rewards(info)]
    )
