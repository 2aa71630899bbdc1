r"""Arithmetic with verifiable answers: sums, expressions, and word problems from templates.

Observation: the problem on one line, "3 + 4"; with an `answer` other than "whole" a second line shows its form. After
a wrong answer that may be retried: "wrong".
Action: an integer in digits, "-" before it if it is negative, and nothing else. With answer="last" any text whose only
line that begins with "answer:" is the last and reads "answer: 7"; with answer="boxed" any text with one \boxed{7}.
Reward: 1 for the right number, else 0. Horizon: one answer; `max_turns` above 1 allows retries.
Levels: 1 sums of small numbers, 2 two operations, 3 brackets and larger numbers, 4 word problems of one step, 5 of two
or three.
Ends: the right answer, or a wrong one with no turn left (terminated), anything else (malformed).
"""

from __future__ import annotations

import re
from fractions import Fraction
from functools import lru_cache
from typing import Any, Literal, get_args

import numpy as np

from envs.base import Info, Split, TextEnv, check_options, draw_valid, text_space, vocabulary

LEVELS = (1, 2, 3, 4, 5)
AnswerForm = Literal["whole", "last", "boxed"]

_INTEGER = "0|-?[1-9][0-9]{0,8}"
_RULES = "Work out the answer, a whole number. "
INSTRUCTIONS: dict[str, str] = {
    "whole": f"{_RULES}Say it in digits and say nothing else.\n",
    "last": f'{_RULES}The last line is "answer: " and the number in digits; no other line begins so.\n',
    "boxed": f"{_RULES}Put it in digits into \\boxed{{}}, once.\n",
}
CUES: dict[str, str] = {"whole": "", "last": "answer:", "boxed": "\\boxed{}"}  # what the second line shows
RIGHT, WRONG, UNREADABLE = "right", "wrong", "That is no answer."

NAMES = ("anna", "ben", "clara", "david", "emma", "felix", "grace", "henry", "ida", "jack", "kate", "leo")
THINGS = (
    "apples",
    "books",
    "cards",
    "coins",
    "cups",
    "eggs",
    "nuts",
    "pens",
    "plums",
    "shells",
    "stamps",
    "stones",
)
RANGES = {
    "i": (0, 20),
    "j": (0, 20),
    "k": (0, 20),
    "n": (2, 20),
    "m": (20, 90),
    "l": (20, 90),
    "t": (2, 9),
    "u": (2, 9),
}

# Text and value of each template. Gaps: names a and b, things, signs p and q, numbers by the letters of RANGES.
PROBLEMS: dict[int, tuple[tuple[str, str], ...]] = {
    1: (("{i} + {j}", "{i} + {j}"),),
    2: tuple(
        (each, each)
        for each in ("{i} {p} {j} {q} {k}", "{i} {p} {j} * {t}", "{i} * {t} {p} {j}", "{n} * {t} {p} {m}")
    ),
    3: tuple(
        (each, each)
        for each in (
            "({m} {p} {n}) * {t} {q} {l}",
            "{m} {p} {t} * ({l} {q} {n})",
            "({i} {p} {n}) * ({m} {q} {t})",
            "{m} {p} ({l} - ({n} {q} {t}))",
            "{t} * ({m} {p} {n}) {q} {u} * ({l} - {i})",
        )
    ),
    4: (
        ("{a} has {n} {things} and finds {m} more. how many {things} has {a} now?", "{n} + {m}"),
        ("{a} has {m} {things}. {a} gives {n} of them to {b}. how many {things} has {a} left?", "{m} - {n}"),
        ("{a} has {n} {things} and {b} has {m}. how many {things} have they together?", "{n} + {m}"),
        ("{a} has {m} {things}. {b} has {n} more than {a}. how many {things} has {b}?", "{m} + {n}"),
        ("{a} has {m} {things}. {b} has {n} fewer than {a}. how many {things} has {b}?", "{m} - {n}"),
        ("{a} fills {t} boxes with {n} {things} each. how many {things} is that?", "{t} * {n}"),
        ("{a} has {n} {things}. {b} has {t} times as many. how many {things} has {b}?", "{n} * {t}"),
        ("{a} shares {m} {things} equally among {t} friends. how many does each get?", "{m} / {t}"),
        ("there are {m} {things}. {a} takes some and {n} are left. how many did {a} take?", "{m} - {n}"),
    ),
    5: (
        (
            "{a} buys {t} boxes of {m} {things} and gives {n} of them to {b}. how many {things} has {a} left?",
            "{t} * {m} - {n}",
        ),
        ("{a} has {n} {things}. {b} has {t} times as many. how many have they together?", "{n} + {n} * {t}"),
        (
            "{a} has {m} {things}, loses {n} and shares the rest equally among {t} friends. how many does each get?",
            "({m} - {n}) / {t}",
        ),
        (
            "{a} and {b} find {m} {things} each. {a} gives {n} of them to {b}. how many more has {b} than {a} now?",
            "({m} + {n}) - ({m} - {n})",
        ),
        (
            "{a} puts {n} {things} into each of {t} bags and {i} into each of {u} boxes. how many {things} is that?",
            "{n} * {t} + {i} * {u}",
        ),
        (
            "{a} had {m} {things}, found {n} more and gave half of all to {b}. how many has {a} left?",
            "({m} + {n}) / 2",
        ),
        (
            "{a} finds {t} {things} a day for {n} days. {b} brings {m} more. how many {things} have they together?",
            "{t} * {n} + {m}",
        ),
        (
            "{a} needs {m} {things} and has {n}. {b} brings {t} boxes of {u}. how many are still missing?",
            "{m} - {n} - {t} * {u}",
        ),
        (
            "{a} has {m} {things}. {b} has {n} fewer than {a}. how many have they together?",
            "{m} + ({m} - {n})",
        ),
    ),
}
_GAP = re.compile("{([a-z]+)}")
WORDS = vocabulary(
    (
        *(_GAP.sub("", said) for level in PROBLEMS.values() for said, _ in level),
        *NAMES,
        *THINGS,
        *CUES.values(),
        RIGHT,
        WRONG,
        UNREADABLE,
    )
)


class Arithmetic(TextEnv):
    """The environment.

    level: see above. answer: the form of an action, see above; "last" and "boxed" leave room for reasoning before it.
    max_turns: attempts per problem. split: "train" and "heldout" divide the problems by text, regardless of the seed;
    "all" contains both. instructions: begin with the rules in English. Raises ValueError for other values.
    """

    action_space = text_space()

    def __init__(
        self,
        level: int = 1,
        answer: AnswerForm = "whole",
        max_turns: int = 1,
        split: Split = "all",
        instructions: bool = True,
    ) -> None:
        check_options(level, LEVELS, split, max_turns)
        if answer not in get_args(AnswerForm):
            raise ValueError(f"answer={answer!r} must be whole, last or boxed")
        self._level = level
        self._style = answer
        self._max_turns = max_turns
        self._split = split
        self._opening = INSTRUCTIONS[answer] if instructions else ""
        self._problem = ""
        self._answer = 0
        self._turns = 0

    @property
    def problem(self) -> str:
        """The current problem, one line."""
        return self._problem

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, Info]:
        super().reset(seed=seed)
        self._problem, self._answer = draw_valid(
            lambda: _draw_problem(self._level, self.np_random), lambda problem: problem[0], self._split
        )
        self._turns = 0
        cue = CUES[self._style]
        return self._opening + (f"{self._problem}\n{cue}" if cue else self._problem), {}

    def step(self, action: str) -> tuple[str, float, bool, bool, Info]:
        if not self._problem:
            raise RuntimeError("step() was called before reset()")
        number = said(action, self._style)
        if number is None:
            return UNREADABLE, 0.0, True, False, {"malformed": True, "success": False}
        self._turns += 1
        right = number == self._answer
        final = right or self._turns >= self._max_turns
        return RIGHT if right else WRONG, float(right), final, False, {"success": right} if final else {}


def said(action: str, style: AnswerForm) -> int | None:
    """The one integer that an action answers with; None if it has another form or several answers."""
    text = action.strip()
    if style == "last":
        lines = [line.strip().lower() for line in text.splitlines()]
        answers = [line for line in lines if line.startswith("answer:")]
        if len(answers) != 1 or lines[-1] != answers[0]:
            return None
        text = answers[0].removeprefix("answer:").strip()
    elif style == "boxed":
        before, *boxes = text.split("\\boxed{")
        if len(boxes) != 1 or "\\boxed" in before + boxes[0]:
            return None
        text = boxes[0].partition("}")[0] if "}" in boxes[0] else ""
    return int(text) if re.fullmatch(_INTEGER, text) else None


class Player:
    """Computes the answer; says a random number below 100 with probability `error_rate`. One per episode."""

    def __init__(self, error_rate: float, seed: int) -> None:
        self._error_rate = error_rate
        self._rng = np.random.default_rng(seed)
        self._answer = 0
        self._style = "whole"

    def act(self, observation: str) -> str:
        """An answer in the requested form, from an observation of any style; the first contains the problem."""
        if observation != WRONG:
            *_, above, last = ["", *observation.splitlines()]
            self._style = next((style for style, cue in CUES.items() if cue == last), "whole")
            self._answer = solved(last if self._style == "whole" else above)
        number = self._answer
        if self._rng.random() < self._error_rate:
            number = int(self._rng.integers(100))
        return {"whole": f"{number}", "last": f"answer: {number}", "boxed": f"\\boxed{{{number}}}"}[
            self._style
        ]


def solved(problem: str) -> int:
    """The answer to a problem of any level, from its text. ValueError for any other text."""
    for pattern, value in _patterns():
        if match := pattern.fullmatch(problem):
            return int(value_of(value.format(**match.groupdict())))
    raise ValueError(f"{problem!r} is no problem of these templates")


def value_of(expression: str) -> Fraction:
    """The exact value of an expression of integers, + - * / and brackets."""
    tokens = re.findall(r"\d+|[-+*/()]", expression)[::-1]
    return _sum(tokens)


def _sum(tokens: list[str]) -> Fraction:
    """The value of the next terms; `tokens` is reversed, and parsed tokens are popped."""
    value = _product(tokens)
    while tokens and tokens[-1] in "+-":
        sign = 1 if tokens.pop() == "+" else -1
        value += sign * _product(tokens)
    return value


def _product(tokens: list[str]) -> Fraction:
    value = _atom(tokens)
    while tokens and tokens[-1] in "*/":
        times = tokens.pop() == "*"
        factor = _atom(tokens)
        value = value * factor if times else value / factor
    return value


def _atom(tokens: list[str]) -> Fraction:
    token = tokens.pop()
    if token != "(":
        return Fraction(int(token))
    value = _sum(tokens)
    tokens.pop()  # the closing bracket
    return value


def _draw_problem(level: int, rng: np.random.Generator) -> tuple[str, int] | None:
    """A problem and its answer; None if the numbers drawn do not fit the template."""
    text, value = PROBLEMS[level][rng.integers(len(PROBLEMS[level]))]
    first, second = rng.choice(len(NAMES), size=2, replace=False)
    gaps = {letter: str(rng.integers(low, high + 1)) for letter, (low, high) in RANGES.items()}
    gaps |= {"a": NAMES[first], "b": NAMES[second], "things": THINGS[rng.integers(len(THINGS))]}
    gaps |= {sign: "+-"[rng.integers(2)] for sign in "pq"}
    answer = value_of(value.format(**gaps))
    in_words = text != value
    if answer.denominator > 1 or (in_words and answer <= 0):
        return None
    return text.format(**gaps), int(answer)


@lru_cache(maxsize=1)
def _patterns() -> list[tuple[re.Pattern[str], str]]:
    """Every template as a pattern with a named group per gap, and its value."""
    return [(_pattern(text), value) for level in PROBLEMS.values() for text, value in level]


def _pattern(text: str) -> re.Pattern[str]:
    met: set[str] = set()
    pieces = []
    for place, part in enumerate(_GAP.split(text)):  # text, gap, text, ..., text
        if place % 2 == 0:
            pieces.append(re.escape(part))
        elif part in met:
            pieces.append(f"(?P={part})")
        else:
            met.add(part)
            pieces.append(f"(?P<{part}>{_kind(part)})")
    return re.compile("".join(pieces))


def _kind(gap: str) -> str:
    return r"\d+" if gap in RANGES else "[-+]" if gap in ("p", "q") else "[a-z]+"
