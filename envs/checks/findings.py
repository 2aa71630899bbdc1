"""What can be found against an environment, and what a recorded episode alone tells of it."""

from __future__ import annotations

import json
import math
import numbers
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from envs.base import named_rewards
from envs.checks.recording import Record, Turn, shown

_ROUNDING = 1e-6  # of a sum of rewards, relative to the sum of their magnitudes

ADVICE = {
    "time": "make it faster, or raise the limit here (--seconds) and in the recipe (env.host)",
    "death": "find out why: run it under a debugger, or python -X faulthandler",
    "pickling": "register a function or class of a module, no lambda and nothing local",
    "raises": "answer every action and every seed; raise only what is a bug",
    "observation": "say text, or a non-empty list of messages with role and content, in JSON's types",
    "reward": "pay finite numbers, and say in reward_range what an episode's come to",
    "ends": "return terminated, truncated as bools, terminated for a final state, truncated for a limit, never both",
    "info": "return a dict; success is said with the last step only, rewards maps names to numbers",
    "sharing": "give away a copy of every observation and info",
    "unreadable": "answer what cannot be read with info['malformed'] and reward 0",
    "gymnasium": "see https://gymnasium.farama.org/introduction/create_custom_env",
    "closing": "let close() be called twice",
    "generators": "draw from self.np_random only",
    "seeding": "call super().reset(seed=seed), draw from self.np_random only, and keep nothing from episode to episode",
    "repetition": "draw from self.np_random only, or say nondeterministic = True in the class",
    "isolation": "keep all state in self: nothing in the class, the module or a default argument",
    "reuse": "have reset() put back all that an episode changes",
    "snapshots": "put all that the next steps depend on into the snapshot, the generator included",
    "elsewhere": "depend on nothing of the process: the order of sets, hash(), the time, files, variables",
}


@dataclass(frozen=True, slots=True)
class Finding:
    """Something an environment does not keep to."""

    kind: str  # a key of ADVICE
    what: str
    where: str

    @property
    def advice(self) -> str:
        """What to do about it."""
        return ADVICE[self.kind]

    def __str__(self) -> str:
        return f"{self.kind}: {self.what} ({self.where}); {self.advice}"


def said(record: Record, seconds: float) -> Iterator[Finding]:
    """Findings of a recorded episode, of which no reset and no step may take longer than `seconds`."""
    if record.reset_seconds > seconds:
        yield Finding("time", f"it took {record.reset_seconds:.1f} s", record.where(0))
    if fault := _misspoken(record.opening):
        yield Finding("observation", fault, record.where(0))
    for number, turn in enumerate(record.turns, start=1):
        yield from answered(turn, record.where(number), seconds)
    for number, turn in enumerate(record.turns, start=1):
        if repr(turn.given) != repr(turn.told):
            yield Finding("sharing", "what it gave was changed by a later step", record.where(number))


def answered(turn: Turn, where: str, seconds: float) -> Iterator[Finding]:
    """Findings of one step's answer."""
    told: tuple[Any, ...] = turn.told  # of whatever types
    observation, reward, terminated, truncated, info = told
    if turn.seconds > seconds:
        yield Finding("time", f"it took {turn.seconds:.1f} s", where)
    if fault := _misspoken(observation):
        yield Finding("observation", fault, where)
    if not isinstance(reward, numbers.Real) or not math.isfinite(reward):
        yield Finding("reward", f"{shown(repr(reward))} is no finite number", where)
    if not isinstance(terminated, bool | np.bool_) or not isinstance(truncated, bool | np.bool_):
        yield Finding("ends", f"terminated={terminated!r}, truncated={truncated!r} are no bools", where)
    elif terminated and truncated:
        yield Finding("ends", "it says terminated and truncated", where)
    if not isinstance(info, dict):
        yield Finding("info", f"{shown(repr(info))} is no dict", where)
        return
    if not turn.ended and info.get("success") is not None:
        yield Finding("info", "it says success before the end", where)
    try:
        named_rewards(info)
    except (TypeError, ValueError, AttributeError) as error:
        yield Finding("info", f"its rewards are not names and numbers: {error}", where)


def _misspoken(observation: Any) -> str:
    """Why this is no observation; empty where it is one."""
    if isinstance(observation, str):
        return ""
    if not isinstance(observation, list) or not observation:
        return f"{type(observation).__name__} {shown(repr(observation))} is no text and no list of messages"
    for message in observation:
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            return f"{shown(repr(message))} is no message with role and content"
    try:
        json.dumps(observation)
    except TypeError as error:
        return f"a message is not JSON: {error}"
    return ""


def paid(record: Record, low: float, high: float) -> Iterator[Finding]:
    """Findings of what an episode earned."""
    slack = _ROUNDING * sum(abs(float(turn.told[1])) for turn in record.turns)
    if not low - slack <= record.reward <= high + slack:
        earned = f"an episode earned {record.reward:g}, outside of [{low:g}, {high:g}]"
        yield Finding("reward", earned, record.where(len(record.turns)))
