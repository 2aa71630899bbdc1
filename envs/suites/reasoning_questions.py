"""reasoning-gym's procedural questions, scored by the package's own scorers. Needs the extra reasoning.

Observation: the question as the package words it.
Action: the answer and nothing else; with answer="tagged" any text with one <answer>...</answer> in it.
Reward: 1 if the package's scorer gives the answer full score, else 0; with `partial` the score, within [0, 1]. An
answer that repeats the question is paid nothing, even if the scorer pays it. Horizon: one answer.
Levels: none; difficulty is set by the options of a dataset.
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

from envs.base import Info, Split, TalkSpace, TextEnv, check_options, draw_valid, text_space
from envs.registry import Env
from envs.suites.evaluated_answers import AnswerCheck, holds_no_huge_number, is_formula, is_literal, is_sum
from envs.suites.rng_isolation import IsolatedRng

PREFIX = "reasoning_gym/"
IDS = tuple(f"{PREFIX}{name}" for name in sorted(DATASETS))
MAX_ANSWER = 1 << 13  # characters
UNREADABLE = "That is no answer."
PROBES = (
    "nothing that anybody would say",
    "0",
)  # a scorer that gives these full score is too lenient, unless they are the answer
AnswerForm = Literal["whole", "tagged"]
INSTRUCTIONS = {
    "whole": "Say the answer and nothing else.\n",
    "tagged": "Say the answer within <answer> and </answer>, once.\n",
}

# Datasets whose scorers evaluate the answer as Python -> the check that an answer must pass.
EVALUATED: dict[str, AnswerCheck] = {
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
# Datasets that evaluate only text they generated themselves, never the answer.
EVALUATE_THEIR_OWN = frozenset(
    ("basic_arithmetic", "bitwise_arithmetic", "codeio", "number_sorting", "propositional_logic")
)
_EVALUATES = re.compile(r"\b(?:eval|exec|parse_expr|sympify)\(")
_TAGGED = re.compile("<answer>(.*?)</answer>", re.DOTALL)


def reasoning_gym(
    env_id: str,
    split: Split = "all",
    instructions: bool = True,
    answer: AnswerForm = "whole",
    partial: bool = False,
    **options: Any,
) -> Env:
    """A replica. options: those of the dataset's own configuration. Others: see ReasoningQuestions."""
    return ReasoningQuestions(env_id.removeprefix(PREFIX), split, instructions, answer, partial, options)


class ReasoningQuestions(TextEnv):
    """One question of a dataset per episode.

    name: of a dataset. split: "train" and "heldout" divide the questions by their text, regardless of the seed. answer:
    the form of an answer, see above. partial: pay the scorer's score, which gives many wrong answers something.
    instructions: begin with how to answer. options: the dataset's own. ValueError for wrong values.
    """

    action_space = text_space(MAX_ANSWER)
    observation_space = TalkSpace()  # some questions are not in ASCII

    def __init__(
        self,
        name: str,
        split: Split = "all",
        instructions: bool = True,
        answer: AnswerForm = "whole",
        partial: bool = False,
        options: dict[str, Any] | None = None,
    ) -> None:
        check_options(1, (1,), split, None)
        if answer not in get_args(AnswerForm):
            raise ValueError(f"answer={answer!r} must be whole or tagged")
        _require_known(name)
        self._name = name
        self._options = dict(options or {})
        self._split = split
        self._opening = INSTRUCTIONS[answer] if instructions else ""
        self._tagged = answer == "tagged"
        self._partial = partial
        self._generators = IsolatedRng()
        self._dataset: Any = None
        self._entry: dict[str, Any] = {}
        self._require_options()

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, Info]:
        super().reset(seed=seed)
        self._dataset, self._entry = draw_valid(self._attempt, lambda it: str(it[1]["question"]), self._split)
        return self._opening + self._entry["question"], {}

    def step(self, action: str) -> tuple[str, float, bool, bool, Info]:
        answer = self._read(action)
        if answer is None:
            return UNREADABLE, 0.0, True, False, {"malformed": True, "success": False}
        score = self._score(answer)
        reward = score if self._partial else float(score == 1.0)
        return "", reward, True, False, {"success": score == 1.0}

    def _attempt(self) -> tuple[Any, dict[str, Any]] | None:
        """A dataset of one question, and the question; None if the right answer is empty."""
        seed = int(self.np_random.integers(2**31))
        self._generators.seed(seed)
        with self._generators.entered():
            dataset = create_dataset(self._name, seed=seed, size=1, **self._options)
            entry = dataset[0]
        return None if entry["answer"] == "" else (dataset, entry)

    def _read(self, action: str) -> str | None:
        """Parse the answer; None if there is none, or none that can be scored."""
        found = _TAGGED.findall(action) if self._tagged else [action]
        if len(found) != 1 or len(action) > MAX_ANSWER or not (answer := found[0].strip()):
            return None
        return answer if holds_no_huge_number(answer) else None

    def _score(self, answer: str) -> float:
        """The reward of an answer, within [0, 1]: the scorer's, if the answer is safe and the scorer strict."""
        right = self._entry["answer"]
        if isinstance(right, str) and answer == right.strip():
            answer = right
        elif self._entry["question"].strip() in answer or not EVALUATED.get(self._name, _any)(answer):
            return 0.0
        score = self._package_score(answer)
        return 0.0 if score == 1.0 and answer != right and self._is_lenient() else score

    def _is_lenient(self) -> bool:
        """Whether the scorer accepts wrong answers: some accept anything but "True", or a common prefix."""
        right = str(self._entry["answer"])
        return any(self._package_score(probe) == 1.0 for probe in PROBES if not _same(probe, right))

    def _package_score(self, answer: str) -> float:
        """The package's score, clipped to [0, 1]."""
        try:
            with self._generators.entered():
                score = float(self._dataset.score_answer(answer, self._entry))
        except Exception:  # scorers raise anything for answers that they cannot parse
            return 0.0
        if math.isclose(score, 1.0, rel_tol=1e-6):
            return 1.0  # a sum of parts, up to rounding
        return min(max(score, 0.0), 1.0) if math.isfinite(score) else 0.0

    def _require_options(self) -> None:
        """Raise ValueError for options that the dataset does not have."""
        fields = [field.name for field in dataclasses.fields(DATASETS[self._name][1])]
        have = [field for field in fields if field not in ("seed", "size")]
        for option in self._options:
            if option not in have:
                raise ValueError(f"no option {option!r}; its options: {', '.join(have)}")
        try:
            with self._generators.entered():
                create_dataset(self._name, seed=0, size=1, **self._options)
        except AssertionError as error:  # the package asserts valid values
            raise ValueError(f"the dataset rejects {self._options}: {error}") from error


def _any(answer: str) -> bool:
    return True


def _same(one: str, other: str) -> bool:
    """Whether two answers are equal as text or as numbers."""
    try:
        return one == other or float(one) == float(other)
    except ValueError:
        return False


def _require_known(name: str) -> None:
    """Raise ValueError for an unknown dataset, or one whose scorer was not reviewed."""
    if name not in DATASETS:
        close = difflib.get_close_matches(name, DATASETS, n=3, cutoff=0.4) or sorted(DATASETS)
        raise ValueError(f"no dataset {name!r}; did you mean {' or '.join(close)}?")
    if name == "composite":
        raise ValueError("composite is not supported; name its datasets as tasks of their own")
    source = inspect.getsource(sys.modules[DATASETS[name][0].__module__])
    if _EVALUATES.search(source) and name not in EVALUATED and name not in EVALUATE_THEIR_OWN:
        raise ValueError(
            f"{name} may evaluate answers as Python, and Manta does not know this version of it; use another dataset"
        )
