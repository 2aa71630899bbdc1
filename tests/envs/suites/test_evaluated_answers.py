"""Checks of answers that a scorer evaluates: valid answers of every kind pass, code does not."""

from __future__ import annotations

import math
import string
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from envs.suites.evaluated_answers import holds_no_huge_number, is_formula, is_literal, is_sum

CODE = [
    "__import__('os').system('true')",
    "open('/etc/passwd').read()",
    "().__class__.__bases__",
    "x.__class__",
    "(lambda: 1)()",
    "[a for a in (1,)]",
    "exec('1')",
    "sin.evalf",
    "f'{1}'",
    "x := 3",
    "x if x else x",
    "sqrt(*x)",
    "sin(x, evaluate=1)",
    "factorial(9)",
    "9999999!",
    "eval",
    "Symbol",
    "",
]
HUGE = [
    "9**9**9",
    "9**(9**9)",
    "(((9**30)**30)**30)**30",
    "2**31",
    "x**(x-x+9**9)",
    "9**(x+99999)",
    "x**1e9",
    "1e400",
]


@pytest.mark.parametrize("text", [*CODE, *HUGE, "x" * 5000, "(" * 1000 + "x" + ")" * 1000, "-" * 1900 + "x"])
def test_no_code_and_no_huge_number_is_a_formula_or_a_sum(text: str) -> None:
    assert not is_sum(text)
    assert not is_formula(text) or text.startswith("-"), "a long formula may be one, and nothing worse"


@pytest.mark.parametrize("text", [*CODE[:-1], "1 + x", "[open]", "[" * 5000, "{1: [x]}"])
def test_only_what_python_calls_a_literal_is_one(text: str) -> None:
    assert not is_literal(text)


@given(st.recursive(st.integers() | st.text() | st.booleans(), lambda inner: st.lists(inner, max_size=3)))
def test_every_literal_is_one(value: object) -> None:
    assert is_literal(repr(value)) == (len(repr(value)) <= 2000)


NUMBERS = st.integers(0, 10**6).map(str)
SUMS = st.recursive(
    NUMBERS,
    lambda inner: st.tuples(inner, st.sampled_from("+-*/"), inner).map(lambda parts: f"({' '.join(parts)})"),
    max_leaves=8,
)


@given(SUMS)
def test_every_sum_is_one_and_a_formula_too(text: str) -> None:
    assert is_sum(text) and is_formula(text)


@pytest.mark.parametrize(
    "text",
    [
        "3*x**2/2 - 5*x + C",
        "-sqrt(2)*cos(3*x + 1)/6",
        "exp(-x)*sin(x)**2",
        "x**(1/2) + x**-3 + 2**x + (x + 1)**(3*n)",
        "6*x**12*y - 1.5*y**2 + pi",
        " log(x)*Abs(x) ",
    ],
)
def test_formulas_by_hand(text: str) -> None:
    assert is_formula(text)


@given(st.text(string.printable, max_size=40))
def test_what_is_a_sum_has_a_value_of_few_digits_or_none(text: str) -> None:
    if is_sum(text):
        try:
            value = Fraction(eval(text.strip()))  # what is tested is that this may be done
        except (SyntaxError, ZeroDivisionError, TypeError, OverflowError):
            return
        assert math.log10(abs(value) + 1) < 40 * 9


def test_numbers_nobody_can_hold() -> None:
    assert not any(map(holds_no_huge_number, ("1e999999999", "3.E+10000", "7/2e-99999")))
    assert all(map(holds_no_huge_number, ("1e300", "one 2020 and 3e2", "ee10000")))
