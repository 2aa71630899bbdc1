"""Programs that are nearly right earn nothing: hidden inputs are drawn where they fail."""

from __future__ import annotations

import numpy as np
import pytest

from envs.builtin.programming import FAMILIES, LEVELS
from envs.builtin.programming_tasks import Arguments, ProgrammingTask, draw_inputs, draw_task
from tests.envs.near_misses import accepted, agrees


def drawn(name: str, seed: int) -> tuple[ProgrammingTask, list[Arguments]]:
    rng = np.random.default_rng(seed)
    task = draw_task([family for family in FAMILIES if family.name == name], "all", rng)
    shown, hidden = draw_inputs(task, 3, 8, rng)
    return task, [*shown, *hidden]


NEXT_PRIMES = """
def next_primes(n):
    found = []
    while len(found) < {k}:
        if n > 1 and all(n % divisor for divisor in range(2, int(n ** 0.5) + 1)):
            found.append(n)
        n += 1
    return sum(found) * {b}
"""


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        ("between", "<= x", "< x"),
        ("between", "x <=", "x <"),
        ("count_primes", "n + 1", "n"),
        ("count_primes", "n + 1", "n + 2"),
        ("those_below", "<", "<="),
        ("count_above", ">", ">="),
        ("coins", "coin <= worth", "coin < worth"),
        ("covered", "<= last", "< last"),
        ("climb", ">=", ">"),
        ("merged", "<=", "<"),
        ("in_base", 'rjust($m, "0")', 'rjust($m + 1, "0")'),
    ],
)
def test_a_boundary_that_is_off_by_one_is_wrong_in_every_task(name: str, right: str, wrong: str) -> None:
    for seed in range(15):
        task, tests = drawn(name, seed)
        before, after = right, wrong
        for parameter, phrase in task.chosen.items():
            before, after = (text.replace(f"${parameter}", phrase) for text in (before, after))
        program = task.solution.replace(before, after)
        assert program != task.solution and agrees(task.solution, task, tests)
        assert not agrees(program, task, tests), (task.says, tests)


def test_a_prime_is_not_greater_than_itself_in_any_task() -> None:
    for seed in range(15):
        task, tests = drawn("next_primes", seed)
        assert not agrees(NEXT_PRIMES.format(**task.chosen), task, tests)


@pytest.mark.slow
@pytest.mark.parametrize(
    "level", [1, 2, *(pytest.param(level, marks=pytest.mark.rare) for level in range(3, LEVELS + 1))]
)
def test_at_most_one_near_miss_in_a_hundred_passes(level: int) -> None:
    """`python -m tests.bench.mutants` counts them over more tasks."""
    others, passed = 0, []
    for seed, family in enumerate(FAMILIES):
        if family.level == level:
            made, _, wrongly = accepted(*drawn(family.name, seed))
            others, passed = others + made, passed + wrongly
    assert others > 100
    assert len(passed) <= others / 100, passed
