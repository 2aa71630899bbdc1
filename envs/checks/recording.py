"""Episodes on a replica, recorded so that two of them can be compared."""

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


class Trouble(RuntimeError):
    """An environment raised, or said what nobody could go on with."""

    def __init__(self, where: str, error: Exception) -> None:
        super().__init__(f"{where}: {shown(repr(error))}")
        self.where = where
        self.error = error


@dataclass(slots=True)
class Turn:
    """One step as it was told, kept as a copy: the environment may go on changing what it gave away."""

    action: str
    given: Outcome
    told: Outcome = field(init=False)
    seconds: float
    snapshot: bytes | None

    def __post_init__(self) -> None:
        self.told = deepcopy(self.given)

    @property
    def ended(self) -> bool:
        return bool(self.told[2]) or bool(self.told[3])


@dataclass(slots=True)
class Record:
    """An episode, from its reset to its end or to the last turn that was asked for."""

    seed: int
    opening: Any
    reset_seconds: float
    turns: list[Turn] = field(default_factory=list)

    @property
    def actions(self) -> list[str]:
        return [turn.action for turn in self.turns]

    @property
    def reward(self) -> float:
        return float(sum(float(turn.told[1]) for turn in self.turns))

    def where(self, turn: int) -> str:
        """Words for a place in the episode: 0 is the reset, k the k-th step."""
        if turn == 0:
            return f"reset, seed {self.seed}"
        action = f", action {shown(repr(self.turns[turn - 1].action))}" if turn <= len(self.turns) else ""
        return f"step {turn}, seed {self.seed}{action}"


class Script:
    """A player that repeats actions."""

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
    """Reset with a seed and play to the end, or for so many turns; `between` is awaited before each. Raises Trouble."""
    began = time.perf_counter()
    with asking(f"reset, seed {seed}"):
        opening = await replica.reset(seed)
    record = Record(seed, deepcopy(opening), time.perf_counter() - began)
    await go_on(replica, record, opening, player, turns, between)
    return record


async def go_on(
    replica: Replica,
    record: Record,
    observation: Any,
    player: Player,
    turns: int,
    between: Callable[[], Awaitable[object]] | None = None,
) -> None:
    """Add to a record what follows, from where the replica stands."""
    for _ in range(turns):
        if between is not None:
            await between()
        where = f"step {len(record.turns) + 1}, seed {record.seed}"
        with asking(f"the player, {where}"):
            action = player.act(observation)
        record.turns.append(await step(replica, action, where))
        if record.turns[-1].ended:
            return
        observation = record.turns[-1].given[0]


async def step(replica: Replica, action: str, where: str) -> Turn:
    """One step. Raises Trouble, also for an answer that is none (the replica says so)."""
    began = time.perf_counter()
    with asking(f"{where}, action {shown(repr(action))}"):
        given = await replica.step(action)
        seconds = time.perf_counter() - began
        ended = bool(given[2]) or bool(given[3])
        return Turn(action, given, seconds=seconds, snapshot=None if ended else replica.snapshot())


def first_difference(one: Record, other: Record) -> int | None:
    """The first place at which two records differ (0: the reset, k: the k-th step), or None."""
    if json.dumps(one.opening) != json.dumps(other.opening):
        return 0
    for number, (turn, twin) in enumerate(zip_longest(one.turns, other.turns), start=1):
        if turn is None or twin is None or _facts(turn.told) != _facts(twin.told):
            return number
    return None


@contextmanager
def asking(where: str) -> Iterator[None]:
    """Around every call into an environment: it is anybody's code and may raise anything."""
    try:
        yield
    except EnvironmentFailed:
        raise
    except Exception as error:
        raise Trouble(where, error) from error


def shown(text: str, most: int = 80) -> str:
    """A text short enough for a message, on one line."""
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[:most]}..."


def _facts(outcome: Outcome) -> str:
    """What Manta goes by, as text: two that are NaN are the same."""
    observation, reward, terminated, truncated, info = outcome
    verdicts = [info.get("success"), info.get("malformed")]
    known = [verdict if verdict is None else bool(verdict) for verdict in verdicts]
    return json.dumps(
        [observation, float(reward), bool(terminated), bool(truncated), known, named_rewards(info)]
    )
