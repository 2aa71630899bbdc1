"""Rewards that another program checks: schemas, code in the sandbox, mathematics."""

from __future__ import annotations

import json
from typing import Any

import pytest

from envs.rewards.checked import code, json_schema, mathematics

SCHEMA = {"type": "object", "required": ["name"], "properties": {"age": {"type": "integer", "minimum": 0}}}


@pytest.mark.parametrize(
    ("completion", "worth"),
    [
        ('{"name": "Ada", "age": 36}', 1),
        ('Here it is:\n```json\n{"name": "Ada"}\n```\nDone.', 1),
        ('{"name": "Ada", "age": -1}', 0),
        ('{"age": 3}', 0),
        ("no JSON", 0),
        ("", 0),
    ],
)
def test_json_fits_its_schema(completion: str, worth: float) -> None:
    assert json_schema(completion, None, schema=SCHEMA) == worth
    assert json_schema(completion, json.dumps(SCHEMA)) == worth


@pytest.mark.parametrize(
    ("body", "worth"),
    [("return x * x", 1.0), ("return x + x", 0.5), ("return", 0.0), ("while True: pass", 0.0)],
)
def test_code_is_worth_the_share_of_tests_it_passes(body: str, worth: float) -> None:
    completion = f"So:\n```python\ndef square(x):\n    {body}\n```"
    assert code(completion, ["assert square(2) == 4", "assert square(3) == 9"], seconds=2) == worth


def test_code_that_reads_and_writes_is_compared_word_by_word() -> None:
    doubled = "```python\nprint(2 * int(input()))\n```"
    tests = {"inputs": ["3\n", "5\n"], "outputs": ["6\n", "11"]}
    assert code(doubled, json.dumps(tests)) == 0.5


@pytest.mark.parametrize(
    ("completion", "truth", "worth"),
    [
        (r"Thus \boxed{\frac{1}{2}}.", "0.5", 1),
        (r"$x = 2\sqrt{3}$", r"\sqrt{12}", 1),
        ("The answer is 3.", "4", 0),
        ("I do not know.", "4", 0),
    ],
)
def test_formulas_are_equal_as_mathematics(completion: str, truth: Any, worth: float) -> None:
    pytest.importorskip("math_verify")
    assert mathematics(completion, truth) == worth
