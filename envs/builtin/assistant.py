"""A tool-using assistant: questions over local data that can only be answered by looking things up.

Observation: "what is the temperature in arlen on may 12?", then the tools' results (see
envs/builtin/assistant_data.py).
Action: calls of the tools weather, calculate, convert and search, any number per turn (see envs/tools/tool_env.py), or
the answer: a number or a name, and nothing else. Reward: 1 for the right answer, else 0. A number may be off by 0.06,
so that rounding to one decimal is right; names are case-insensitive. No question contains its answer.
Horizon: `max_calls` calls, and the answer.
Levels: how many calls a question needs, 1 to 4. One: a look at the weather, a search, a sum, a conversion. More: what
one call answers is what the next one is about, "the birthplace of the mayor of arlen", or two are compared.
Ends: an answer (terminated), calls used up (truncated), neither a call nor an answer (malformed).
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from operator import itemgetter
from typing import Any

import numpy as np

from envs.base import Info, Observation, Split, TextEnv, check_options, draw_valid
from envs.builtin.assistant_data import (
    BIRTHPLACES,
    DAYS,
    MAYORS,
    MONTHS,
    PEOPLE,
    PLACES,
    QUANTITIES,
    TOOLS,
    TOWERS,
    TRADE_OF,
    TRADES,
    UNITS,
    converted,
    evaluated,
    measured,
)
from envs.tools.tool_calls import Style, ToolCall, write_call
from envs.tools.tool_env import Toolbox, ToolEnv

LEVELS = 4
TOLERANCE = Fraction("0.06")
NAMES = frozenset((*PLACES, *PEOPLE, *TRADES))

_PAIRS = (
    ("km", "miles"),
    ("metres", "feet"),
    ("kg", "pounds"),
    ("litres", "gallons"),
    ("celsius", "fahrenheit"),
)
_OTHER_UNIT = {"temperature": ("celsius", "fahrenheit"), "tower": ("metres", "feet")}
_NUMBER = re.compile(r"-?[0-9]{1,9}(\.[0-9]{1,6})?")

INSTRUCTIONS = {
    "hermes": "Use the tools to answer the question. Answer with a number or a name and nothing else.\n",
    "plain": "Call tools by lines like name(value, value), then answer with a number or a name and nothing else.\n",
}
# The vocabulary, for word-level tokenizers.
WORDS = (
    *("what", "is", "the", "of", "in", "on", "times", "minus"),
    *("mayor", "birthplace", "trade", "height", "tower"),
    *(
        "weather",
        "place",
        "date",
        "calculate",
        "expression",
        "convert",
        "amount",
        "unit",
        "to",
        "search",
        "words",
    ),
    *(*QUANTITIES, *UNITS, *MONTHS, *PLACES, *PEOPLE, *TRADES),
)

Answer = str | Fraction


def assistant(
    level: int = 1,
    split: Split = "all",
    instructions: bool = True,
    style: Style = "hermes",
    max_calls: int = 8,
) -> ToolEnv:
    """The environment with its tools.

    level: calls a question needs. split: "train" and "heldout" divide the questions by text; "all" contains both.
    instructions: begin with the task. style: how calls are written, see `envs.tools.tool_calls`; "plain" is for models
    too small for JSON. max_calls: calls per episode; two more are refused before the episode is truncated. Raises
    ValueError for wrong values.
    """
    toolbox = Toolbox(TOOLS, call_seconds=None)
    env = Assistant(level, split, INSTRUCTIONS.get(style, "") if instructions else "")
    return ToolEnv(env, toolbox, style=style, max_calls=max_calls, verdict=True)


class Assistant(TextEnv):
    """The question and the answer; `assistant` adds the tools."""

    def __init__(self, level: int, split: Split, opening: str) -> None:
        check_options(level, range(1, LEVELS + 1), split, max_turns=None)
        self._level = level
        self._split = split
        self._opening = opening
        self._answer: Answer | None = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, Info]:
        super().reset(seed=seed)
        question, self._answer = draw_valid(self._attempt, itemgetter(0), self._split)
        return self._opening + question, {}

    def step(self, action: str) -> tuple[str, float, bool, bool, Info]:
        if self._answer is None:
            raise RuntimeError("step() was called before reset()")
        said = read(action)
        if said is None:
            return "That is no answer.", 0.0, True, False, {"malformed": True, "success": False}
        right = agree(said, self._answer)
        return "right" if right else "wrong", float(right), True, False, {"success": right}

    def _attempt(self) -> tuple[str, Answer] | None:
        """A question and its answer; None if the question contains the answer."""
        asked, answer = _draw_question(self._level, self.np_random)
        question = f"what is {asked}?"
        return None if contains_answer(answer, question) else (question, answer)


def read(action: str) -> Answer | None:
    """Parse an answer; None for anything but one number or one name."""
    text = action.strip().lower()
    if text in NAMES:
        return text
    return Fraction(text) if _NUMBER.fullmatch(text) else None


def agree(said: Answer, right: Answer) -> bool:
    """Whether an answer is right."""
    if isinstance(said, Fraction) and isinstance(right, Fraction):
        return abs(said - right) <= TOLERANCE
    return said == right


def contains_answer(answer: Answer, question: str) -> bool:
    """Whether a word of the question, repeated, would be the answer."""
    said = (read(word) for word in re.findall(r"[a-z]+|-?[0-9.]+", question))
    return any(each is not None and agree(each, answer) for each in said)


# Questions: a text and its answer, drawn to need a given number of calls ------------------------------------------

_Rng = np.random.Generator


def _draw_question(calls: int, rng: _Rng) -> tuple[str, Answer]:
    draws = [_name, _measure, *([_literal] if calls == 1 else [_in_other_unit, _times])]
    if calls >= 3:
        draws.append(_difference)
    return draws[rng.integers(len(draws))](calls, rng)


def _one_of(among: Sequence[str], rng: _Rng) -> str:
    return among[int(rng.integers(len(among)))]


def _place(calls: int, rng: _Rng) -> tuple[str, str]:
    if calls == 0:
        place = _one_of(PLACES, rng)
        return place, place
    text, person = _person(calls - 1, rng)
    return f"the birthplace of {text}", BIRTHPLACES[person]


def _person(calls: int, rng: _Rng) -> tuple[str, str]:
    if calls == 0:
        person = _one_of(PEOPLE, rng)
        return person, person
    text, place = _place(calls - 1, rng)
    return f"the mayor of {text}", MAYORS[place]


def _name(calls: int, rng: _Rng) -> tuple[str, Answer]:
    kind = rng.integers(3)
    if kind == 0:
        text, person = _person(calls - 1, rng)
        return f"the trade of {text}", TRADE_OF[person]
    return _place(calls, rng) if kind == 1 else _person(calls, rng)


def _measure(calls: int, rng: _Rng) -> tuple[str, Answer]:
    return _measured(_one_of([*QUANTITIES, "tower"], rng), calls, rng)


def _measured(what: str, calls: int, rng: _Rng) -> tuple[str, Fraction]:
    text, place = _place(calls - 1, rng)
    if what == "tower":
        return f"the height of the tower of {text}", Fraction(TOWERS[place])
    date = f"{_one_of(MONTHS, rng)} {rng.integers(1, DAYS + 1)}"
    return f"the {what} in {text} on {date}", Fraction(measured(what, place, date))


def _in_other_unit(calls: int, rng: _Rng) -> tuple[str, Answer]:
    what = _one_of(list(_OTHER_UNIT), rng)
    text, value = _measured(what, calls - 1, rng)
    unit, to = _OTHER_UNIT[what]
    return f"{text} in {to}", converted(value, unit, to)


def _times(calls: int, rng: _Rng) -> tuple[str, Answer]:
    text, value = _measured(_one_of([*QUANTITIES, "tower"], rng), calls - 1, rng)
    factor = int(rng.integers(2, 10))
    return f"{factor} times {text}", factor * value


def _difference(calls: int, rng: _Rng) -> tuple[str, Answer]:
    what = _one_of([*QUANTITIES, "tower"], rng)
    of_first = int(rng.integers(1, calls - 1))
    first, minuend = _measured(what, of_first, rng)
    second, subtrahend = first, minuend
    while second == first:  # one thing is looked up once
        second, subtrahend = _measured(what, calls - 1 - of_first, rng)
    return f"{first} minus {second}", minuend - subtrahend


def _literal(calls: int, rng: _Rng) -> tuple[str, Answer]:
    assert calls == 1
    if rng.random() < 0.5:
        a, b, c = (int(number) for number in rng.integers(2, 100, 3))
        text = f"{a} {_one_of('+-*', rng)} {b} {_one_of('+-', rng)} {c}"
        return text, evaluated(text)
    amount = int(rng.integers(2, 100))
    unit, to = _PAIRS[rng.integers(len(_PAIRS))]
    return f"{amount} {unit} in {to}", converted(Fraction(amount), unit, to)


# The scripted player ----------------------------------------------------------------------------------------------

_FACT = r" is (\S+?)(?: metres)?\.$"
_FORMS: tuple[tuple[str, str], ...] = (  # the first match decides what a phrase asks for
    ("difference", r"(.+) minus (.+)"),
    ("times", r"([0-9]+) times (.+)"),
    ("sum", r"([0-9 +*-]+)"),
    ("amount", rf"([0-9]+) ({'|'.join(UNITS)}) in ({'|'.join(UNITS)})"),
    ("unit", rf"(.+) in ({'|'.join(UNITS)})"),
    ("weather", rf"the ({'|'.join(QUANTITIES)}) in (.+) on ([a-z]+ [0-9]+)"),
    ("fact", r"the (mayor|birthplace|trade|height of the tower) of (.+)"),
)


@dataclass(frozen=True)
class _Lookup:
    """A call that finds what a phrase stands for, and the pattern of the value in the tool's result."""

    phrase: str
    call: ToolCall
    pattern: str = r"(-?[0-9.]+)$"


class Player:
    """Resolves a question from the inside out, one call per turn; errs with probability `error_rate` per turn.

    An error is a random call or answer. One per episode.
    """

    def __init__(self, error_rate: float, seed: int) -> None:
        self._error_rate = error_rate
        self._rng = np.random.default_rng(seed)
        self._style: Style = "hermes"
        self._question = ""
        self._known: dict[str, str] = {}
        self._pending: _Lookup | None = None

    def act(self, observation: Observation) -> str:
        """The next call or the answer, from the last observation."""
        assert not isinstance(observation, str), "observations of an environment with tools are messages"
        content = observation[-1]["content"]
        if tools := observation[0].get("tools"):
            self._style = tools[0].get("style", "hermes")
            self._question = content[content.rindex("what is ") + len("what is ") :].rstrip("?")
        elif self._pending is not None and (found := re.search(self._pending.pattern, content)):
            self._known[self._pending.phrase] = found[1]
        self._pending = None
        if self._rng.random() < self._error_rate or content.endswith("answer without tools."):
            return self._random_action()
        step = self._solved(self._question)
        if isinstance(step, str):
            return step
        self._pending = step
        return write_call(step.call, self._style)

    def _solved(self, phrase: str) -> str | _Lookup:
        """The value of a phrase, or the call that has to come first."""
        if phrase in self._known or phrase in NAMES:
            return self._known.get(phrase, phrase)
        kind, parts = next(
            (kind, found.groups()) for kind, form in _FORMS if (found := re.fullmatch(form, phrase))
        )
        inner = {
            "difference": parts,
            "times": parts[1:],
            "unit": parts[:1],
            "weather": parts[1:2],
            "fact": parts[1:],
        }
        values = []
        for each in inner.get(kind, ()):
            value = self._solved(each)
            if isinstance(value, _Lookup):
                return value
            values.append(value)
        match kind:
            case "difference":
                return _Lookup(phrase, ToolCall("calculate", {"expression": " - ".join(values)}))
            case "times":
                return _Lookup(phrase, ToolCall("calculate", {"expression": f"{parts[0]} * {values[0]}"}))
            case "sum":
                return _Lookup(phrase, ToolCall("calculate", {"expression": phrase}))
            case "amount":
                return _Lookup(phrase, _conversion(*parts))
            case "unit":
                unit = next(unit for unit, to in _OTHER_UNIT.values() if to == parts[1])
                return _Lookup(phrase, _conversion(values[0], unit, parts[1]))
            case "weather":
                call = ToolCall("weather", {"place": values[0], "date": parts[2]})
                return _Lookup(phrase, call, rf"{parts[0]} (-?[0-9]+)")
        return _Lookup(phrase, ToolCall("search", {"words": f"{parts[0]} of {values[0]}"}), _FACT)

    def _random_action(self) -> str:
        rng = self._rng
        place, person = _one_of(PLACES, rng), _one_of(PEOPLE, rng)
        number = int(rng.integers(-20, 100))
        calls = (
            ToolCall(
                "weather", {"place": place, "date": f"{_one_of(MONTHS, rng)} {rng.integers(1, DAYS + 1)}"}
            ),
            ToolCall("calculate", {"expression": f"{number} * 2"}),
            _conversion(str(number), *_PAIRS[rng.integers(len(_PAIRS))]),
            ToolCall("search", {"words": person}),
        )
        if rng.random() < 0.5:
            return write_call(calls[rng.integers(len(calls))], self._style)
        return _one_of([place, person, _one_of(TRADES, rng), str(number)], rng)


def _conversion(amount: str, unit: str, to: str) -> ToolCall:
    return ToolCall("convert", {"amount": json.loads(amount), "unit": unit, "to": to})
