"""Rewards that compare with the right answer: what people write, and what it is worth."""

from __future__ import annotations

from typing import Any

import pytest

from envs.rewards.answers import choice, contains, exact, number, regex


@pytest.mark.parametrize(
    ("completion", "truth", "worth"),
    [
        ("42", "Natalia sold 48/2 = 24. 48+24 = 72.\n#### 72", 0),
        ("So 48 + 24 = 72.", "Natalia sold 48/2 = 24. 48+24 = 72.\n#### 72", 1),
        ("The total is $1,234.50.", "1234.5", 1),
        ("1,234", 1234, 1),
        ("-7", "7", 0),
        ("it is minus -7", -7, 1),
        ("between 3-5", "5", 1),  # a dash between numbers is no sign
        ("<answer>12</answer> (I tried 13)", "12", 1),
        ("12 <answer></answer>", "12", 0),
        ("none", "0", 0),
        ("3e2", 300, 1),
        ("0.1", "0.10", 1),
        ("5", ["4", "5"], 1),
        ("5", '["4", "6"]', 0),
        ("", "", 0),
        ("7", None, 0),
        ("1" * 400, "1" * 400, 1),  # no float
    ],
)
def test_the_last_number_said_is_the_answer(completion: str, truth: Any, worth: float) -> None:
    assert number(completion, truth) == worth


def test_a_number_may_be_off_by_the_tolerance() -> None:
    assert [number(said, "0.3", tolerance=0.1) for said in ("0.2", "0.4", "0.41")] == [1, 1, 0]


@pytest.mark.parametrize(
    ("completion", "truth", "worth"),
    [
        ("  Paris ", "paris", 1),
        ("Paris, France", "Paris", 0),
        ("I think <answer>the  Seine</answer>", "The Seine", 1),
        ("Paris", ["Lyon", "Paris"], 1),
        ("", None, 0),
    ],
)
def test_an_exact_answer_is_the_same_words(completion: str, truth: Any, worth: float) -> None:
    assert exact(completion, truth) == worth


def test_case_matters_where_that_is_asked() -> None:
    assert exact("paris", "Paris", ignore_case=False) == 0
    assert contains("in PARIS", "Paris", ignore_case=False) == 0


@pytest.mark.parametrize(
    ("completion", "truth", "worth"),
    [
        ("It flows through Paris.", "paris", 1),
        ("It flows through Parisian streets.", "Paris", 0),  # whole words
        ("C++ is older", "C++", 1),
        ("anything", "", 0),
    ],
)
def test_what_is_contained_stands_there_as_words(completion: str, truth: Any, worth: float) -> None:
    assert contains(completion, truth) == worth


@pytest.mark.parametrize(
    ("completion", "truth", "worth"),
    [
        ("B", "B", 1),
        ("The answer is (C).", "C", 1),
        ("Answer: **b**", "B", 1),
        ("Not A, since D holds. So I choose D.", "(D)", 1),
        ("A or B? The answer is A. B is wrong.", "A", 1),
        ("Apples", "A", 0),
    ],
)
def test_the_letter_chosen_is_what_the_answer_names(completion: str, truth: str, worth: float) -> None:
    assert choice(completion, truth) == worth


def test_a_pattern_is_the_options_or_the_rows() -> None:
    assert regex("id-123", r"id-\d+") == 1
    assert regex("id-x", r"id-\d+") == 0
    assert regex("final: 12", "12", pattern=r"final: (\w+)") == 1
    assert regex("final: 13", "12", pattern=r"final: (\w+)") == 0
    assert regex("<think>a</think>b", None, pattern=r"^<think>.*</think>") == 1
