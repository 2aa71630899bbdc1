"""Violations of the environment contract: kinds, advice, and checks of a single recorded episode."""

from __future__ import annotations

import json
import math
import numbers
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from envs.base import named_costs, named_rewards
from envs.checks.recording import Record, RecordedTurn, shown

_ROUNDING = 1e-6  # tolerance of a sum of rewards, relative to the sum of their magnitudes

ADVICE = {
    "time": "make it faster, or raise the limit here (--seconds) and in the factory (env.host)",
    "death": "find out why: run it under a debugger, or python -X faulthandler",
    "pickling": "register a module-level function or class, not a lambda or a local one",
    "raises": "accept every action and every seed; raise for bugs only",
    "observation": "return text, or a non-empty list of messages with role and content, of JSON types",
    "reward": "return finite numbers, and declare the range of an episode's return in reward_range",
    "ends": "return terminated and truncated as bools: the first for a final state, the second for a limit, never both",
    "info": "return a dict; set success with the last step only; rewards maps names to numbers",
    "sharing": "return a copy of every observation and info",
    "unreadable": "answer an action that cannot be parsed with info['malformed'] and reward 0",
    "gymnasium": "see https://gymnasium.farama.org/introduction/create_custom_env",
    "closing": "make close() safe to call twice",
    "generators": "draw from self.np_random only",
    "seeding": "call super().reset(seed=seed), draw from self.np_random only, and keep no state between episodes",
    "repetition": "draw from self.np_random only, or set nondeterministic = True in the class",
    "isolation": "keep all state in self: none in the class, the module or a default argument",
    "reuse": "have reset() restore everything that an episode changes",
    "snapshots": "include everything that later steps depend on in the snapshot, the generator too",
    "elsewhere": "depend on nothing of the process: order of sets, hash(), time, files, environment variables",
}


@dataclass(frozen=True, slots=True)
class Issue:
    """A rule of the contract that an environment breaks."""

    kind: str  # a key of ADVICE
    what: str
    where: str

    @property
    def advice(self) -> str:
        """How to fix it."""
        return ADVICE[self.kind]

    def __str__(self) -> str:
        return f"{self.kind}: {self.what} ({self.where}); {self.advice}"


def check_record(record: Record, seconds: float) -> Iterator[Issue]:
    """Violations in a recorded episode whose reset and steps may take at most `seconds` each."""
    if record.reset_seconds > seconds:
        yield Issue("time", f"it took {record.reset_seconds:.1f} s", record.where(0))
    if fault := _observation_fault(record.opening):
        yield Issue("observation", fault, record.where(0))
    for number, turn in enumerate(record.turns, start=1):
        yield from check_turn(turn, record.where(number), seconds)
    for number, turn in enumerate(record.turns, start=1):
        if repr(turn.original) != repr(turn.outcome):
            yield Issue("sharing", "a returned object was changed by a later step", record.where(number))


def check_turn(turn: RecordedTurn, where: str, seconds: float) -> Iterator[Issue]:
    """Violations in the result of one step."""
    outcome: tuple[Any, ...] = turn.outcome  # of any types
    observation, reward, terminated, truncated, info = outcome
    if turn.seconds > seconds:
        yield Issue("time", f"it took {turn.seconds:.1f} s", where)
    if fault := _observation_fault(observation):
        yield Issue("observation", fault, where)
    if not isinstance(reward, numbers.Real) or not math.isfinite(reward):
        yield Issue("reward", f"{shown(repr(reward))} is not a finite number", where)
    if not isinstance(terminated, bool | np.bool_) or not isinstance(truncated, bool | np.bool_):
        yield Issue("ends", f"terminated={terminated!r}, truncated={truncated!r} are not bools", where)
    elif terminated and truncated:
        yield Issue("ends", "terminated and truncated are both set", where)
    if not isinstance(info, dict):
        yield Issue("info", f"{shown(repr(info))} is not a dict", where)
        return
    if not turn.ended and info.get("success") is not None:
        yield Issue("info", "success is set before the end", where)
    try:
        named_rewards(info)
    except (TypeError, ValueError, AttributeError) as error:
        yield Issue("info", f"rewards does not map names to numbers: {error}", where)
    try:
        named_costs(info)
    except (TypeError, ValueError) as error:
        yield Issue("info", f"costs does not map names to numbers of 0 or more: {error}", where)


def _observation_fault(observation: Any) -> str:
    """Why a value is not an observation; empty if it is one."""
    if isinstance(observation, str):
        return ""
    if not isinstance(observation, list) or not observation:
        return f"{type(observation).__name__} {shown(repr(observation))} is neither text nor messages"
    for message in observation:
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            return f"{shown(repr(message))} is not a message with role and content"
    try:
        json.dumps(observation)
    except TypeError as error:
        return f"a message is not JSON: {error}"
    return ""


def check_return(record: Record, low: float, high: float) -> Iterator[Issue]:
    """Check an episode's return against the environment's reward_range."""
    slack = _ROUNDING * sum(abs(float(turn.outcome[1])) for turn in record.turns)
    if not low - slack <= record.reward <= high + slack:
        what = f"the return of an episode, {record.reward:g}, is outside of [{low:g}, {high:g}]"
        yield Issue("reward", what, record.where(len(record.turns)))
