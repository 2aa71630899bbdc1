"""reasoning-gym's procedural questions, scored by the package's own scorers. Needs the extra reasoning.

Observation: the question as the package words it.
Action: the answer and nothing else; with answer="tagged" any text with one <answer>...</answer> in it.
Reward: 1 for an answer that the package's scorer gives all of 1, else 0; with `partial` what it gives, within [0, 1].
The question said back is paid nothing, whatever the scorer would give. Horizon: one answer.
Levels: none of ours; the options of a dataset are its own.
Ends: an answer (terminated), no answer or more than one (malformed).
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import math
import re
import sys
from typing import Any, Literal, get_args

from reasoning_gym.factory import DATASETS, create_dataset

from envs.base import Info, Split, TalkSpace, TextEnv, check_options, drawn, text_space
from envs.registry import Env
from envs.suites.evaluated_answers import Judge, holds_no_huge_number, is_formula, is_literal, is_sum
from envs.suites.rng_isolation import Generators

PREFIX = "reasoning_gym/"
IDS = tuple(f"{PREFIX}{name}" for name in sorted(DATASETS))
MAX_ANSWER = 1 << 13  # characters
UNREADABLE = "That is no answer."
PROBES = (
    "nothing that anybody would say",
    "0",
)  # for which no scorer may give all, unless they are the answer
Style = Literal["whole", "tagged"]
INSTRUCTIONS = {
    "whole": "Say the answer and nothing else.\n",
    "tagged": "Say the answer within <answer> and </answer>, once.\n",
}

# Datasets whose scorers evaluate the answer as Python, and which answers they may have.
EVALUATED: dict[str, Judge] = {
    "binary_matrix": is_literal,
    "n_queens": is_literal,
    "spiral_matrix": is_literal,
    "string_insertion": is_literal,
    "countdown": is_sum,
    "puzzle24": is_sum,
    "intermediate_integration": is_formula,
    "polynomial_multiplication": is_formula,
    "simple_integration": is_formula,
}
# Datasets that evaluate what they have made themselves, and never the answer.
EVALUATE_THEIR_OWN = frozenset(
    ("basic_arithmetic", "bitwise_arithmetic", "codeio", "number_sorting", "propositional_logic")
)
_EVALUATES = re.compile(r"\b(?:eval|exec|parse_expr|sympify)\(")
_TAGGED = re.compile("<answer>(.*?)</answer>", re.DOTALL)


def reasoning_gym(
    env_id: str,
    split: Split = "all",
    instructions: bool = True,
    answer: Style = "whole",
    partial: bool = False,
    **options: Any,
) -> Env:
    """A replica. options: those of the dataset's own configuration. Others: see ReasoningQuestions."""
    return ReasoningQuestions(env_id.removeprefix(PREFIX), split, instructions, answer, partial, options)


class ReasoningQuestions(TextEnv):
    """The environment.

    name: of a dataset. split: "train" and "heldout" divide the questions by their words, whatever the seed. answer:
    how it is said, see above. partial: pay what the scorer gives, which is something for many a wrong answer.
    instructions: begin with how to answer. options: the dataset's own. ValueError for wrong ones.
    """

    action_space = text_space(MAX_ANSWER)
    observation_space = TalkSpace()  # some questions are not in ASCII

    def __init__(
        self,
        name: str,
        split: Split = "all",
        instructions: bool = True,
        answer: Style = "whole",
        partial: bool = False,
        options: dict[str, Any] | None = None,
    ) -> None:
        check_options(1, (1,), split, None)
        if answer not in get_args(Style):
            raise ValueError(f"answer={answer!r} must be whole or tagged")
        _require_known(name)
        self._name = name
        self._options = dict(options or {})
        self._split = split
        self._opening = INSTRUCTIONS[answer] if instructions else ""
        self._tagged = answer == "tagged"
        self._partial = partial
        self._generators = Generators()
        self._dataset: Any = None
        self._entry: dict[str, Any] = {}
        self._require_options()

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, Info]:
        super().reset(seed=seed)
        self._dataset, self._entry = drawn(self._attempt, lambda pair: str(pair[1]["question"]), self._split)
        return self._opening + self._entry["question"], {}

    def step(self, action: str) -> tuple[str, float, bool, bool, Info]:
        answer = self._read(action)
        if answer is None:
            return UNREADABLE, 0.0, True, False, {"malformed": True, "success": False}
        score = self._scored(answer)
        reward = score if self._partial else float(score == 1.0)
        return "", reward, True, False, {"success": score == 1.0}

    def _attempt(self) -> tuple[Any, dict[str, Any]] | None:
        """A dataset of one question, and that; None where nothing said would be the right answer."""
        seed = int(self.np_random.integers(2**31))
        self._generators.seed(seed)
        with self._generators.entered():
            dataset = create_dataset(self._name, seed=seed, size=1, **self._options)
            entry = dataset[0]
        return None if entry["answer"] == "" else (dataset, entry)

    def _read(self, action: str) -> str | None:
        """The answer that is said; None where there is none, or none that can be scored."""
        found = _TAGGED.findall(action) if self._tagged else [action]
        if len(found) != 1 or len(action) > MAX_ANSWER or not (answer := found[0].strip()):
            return None
        return answer if holds_no_huge_number(answer) else None

    def _scored(self, answer: str) -> float:
        """What an answer is worth, within [0, 1]: what the scorer gives, where it may have it and does judge."""
        right = self._entry["answer"]
        if isinstance(right, str) and answer == right.strip():
            answer = right
        elif self._entry["question"].strip() in answer or not EVALUATED.get(self._name, _any)(answer):
            return 0.0
        score = self._given(answer)
        return 0.0 if score == 1.0 and answer != right and self._gives_it_away() else score

    def _gives_it_away(self) -> bool:
        """Whether the scorer takes for right what is not: some do whatever is not "True", or begins alike."""
        right = str(self._entry["answer"])
        return any(self._given(probe) == 1.0 for probe in PROBES if not _same(probe, right))

    def _given(self, answer: str) -> float:
        """What the package's scorer gives, within [0, 1]."""
        try:
            with self._generators.entered():
                score = float(self._dataset.score_answer(answer, self._entry))
        except Exception:  # a scorer raises whatever it likes at an answer it cannot read
            return 0.0
        if math.isclose(score, 1.0, rel_tol=1e-6):
            return 1.0  # the sum of parts, but for rounding
        return min(max(score, 0.0), 1.0) if math.isfinite(score) else 0.0

    def _require_options(self) -> None:
        """ValueError for options the dataset does not take."""
        fields = [field.name for field in dataclasses.fields(DATASETS[self._name][1])]
        have = [field for field in fields if field not in ("seed", "size")]
        for option in self._options:
            if option not in have:
                raise ValueError(f"there is no option {option!r}; its own are {', '.join(have)}")
        try:
            with self._generators.entered():
                create_dataset(self._name, seed=0, size=1, **self._options)
        except AssertionError as error:  # how the package refuses values
            raise ValueError(f"{self._options} are refused: {error}") from error


def _any(answer: str) -> bool:
    return True


def _same(one: str, other: str) -> bool:
    """Whether two answers are the same text or the same number."""
    try:
        return one == other or float(one) == float(other)
    except ValueError:
        return False


def _require_known(name: str) -> None:
    """ValueError for a dataset that is none, or whose scorer nobody here has looked at."""
    if name not in DATASETS:
        close = difflib.get_close_matches(name, DATASETS, n=3, cutoff=0.4) or sorted(DATASETS)
        raise ValueError(f"there is no dataset {name!r}; did you mean {' or '.join(close)}?")
    if name == "composite":
        raise ValueError("a composite is made by tasks of several environments; use its parts by their names")
    source = inspect.getsource(sys.modules[DATASETS[name][0].__module__])
    if _EVALUATES.search(source) and name not in EVALUATED and name not in EVALUATE_THEIR_OWN:
        raise ValueError(
            f"{name} may evaluate answers as Python, and this version of it is not known here; it is not played"
        )
