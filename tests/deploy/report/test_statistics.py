from __future__ import annotations

from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.report.statistics import (
    clustered_interval,
    majority_success,
    mcnemar,
    pass_at_k,
    wilson_interval,
)


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        # By hand with z^2 = 3.8416: 5 of 10 has centre 1/2 and half width
        # 1.96 / 1.38416 * sqrt(0.25 / 10 + 3.8416 / 400) = 0.263410
        (5, 10, 0.236590, 0.763410),
        # 0 of 10: high = z^2/n / (1 + z^2/n) = 0.38416 / 1.38416
        (0, 10, 0.0, 0.277540),
        (10, 10, 0.722460, 1.0),
        # 15 of 100: centre (0.15 + 0.019208) / 1.038416 = 0.162948,
        # half 1.96 / 1.038416 * sqrt(0.001275 + 0.00009604) = 0.069888
        (15, 100, 0.093060, 0.232836),
    ],
)
def test_wilson_interval_equals_hand_computation(successes: int, n: int, low: float, high: float) -> None:
    assert wilson_interval(successes, n) == pytest.approx((low, high), abs=2e-6)


@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_ends_solve_the_score_equation_and_enclose_the_share(counts: tuple[int, int]) -> None:
    # The interval's ends are the p at which |share - p| is exactly z standard errors computed at p itself.
    successes, n = counts
    low, high = wilson_interval(successes, n)
    share = successes / n
    assert 0 <= low <= share <= high <= 1
    for p in (low, high):
        if 0 < p < 1:
            assert abs(share - p) == pytest.approx(1.96 * (p * (1 - p) / n) ** 0.5, rel=1e-6)


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (3, 2), (-1, 4)])
def test_impossible_counts_are_refused(successes: int, n: int) -> None:
    with pytest.raises(ValueError, match="0 <= successes <= n"):
        wilson_interval(successes, n)


def test_the_bootstrap_interval_is_that_of_the_central_limit_and_the_same_twice() -> None:
    values = np.random.default_rng(3).gamma(2.0, 0.3, size=400)
    ours = clustered_interval([[value] for value in values.tolist()])
    error = 1.96 * values.std(ddof=1) / 400**0.5
    assert ours == pytest.approx((values.mean() - error, values.mean() + error), abs=0.15 * error)
    assert clustered_interval([[value] for value in values.tolist()]) == ours
    assert clustered_interval([[0.5]]) == (0.5, 0.5)
    with pytest.raises(ValueError, match="one value or more"):
        clustered_interval([])


def test_a_clustered_interval_is_that_of_all_resamples_of_whole_tasks() -> None:
    # Five tasks of unequal numbers of samples have 5^5 equally likely resamples.
    tasks = [[1.0, 0.0, 1.0, 1.0], [0.0], [1.0, 1.0], [0.0, 0.0, 0.0], [0.5, 1.0]]
    means = [
        sum(sum(tasks[each]) for each in drawn) / sum(len(tasks[each]) for each in drawn)
        for drawn in product(range(5), repeat=5)
    ]
    assert clustered_interval(tasks) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), abs=0.02)
    # Samples that always agree say no more than one of them: a task is one observation.
    agreed = [[float(seed % 3 == 0)] * 8 for seed in range(60)]
    assert clustered_interval(agreed) == clustered_interval([task[:1] for task in agreed])


@pytest.mark.parametrize("samples", range(1, 8))
def test_pass_at_k_is_the_share_of_all_choices_of_k_samples_with_a_right_one(samples: int) -> None:
    for correct in range(samples + 1):
        right = [True] * correct + [False] * (samples - correct)
        for k in range(1, samples + 1):
            chosen = [any(each) for each in combinations(right, k)]
            assert pass_at_k(samples, correct, k) == pytest.approx(sum(chosen) / len(chosen), abs=1e-12)
    with pytest.raises(ValueError, match="1 <= k <= samples"):
        pass_at_k(samples, 0, samples + 1)


def test_pass_at_k_of_many_samples_does_not_overflow() -> None:
    # 1 - C(100000 - 1000, 10) / C(100000, 10), by logarithms.
    expected = 1 - np.exp(sum(np.log((99000 - i) / (100000 - i)) for i in range(10)))
    assert pass_at_k(100_000, 1000, 10) == pytest.approx(expected, rel=1e-9)


def test_the_majority_wins_and_a_tie_counts_by_parts() -> None:
    assert majority_success([("4", True), ("4", True), ("5", False)]) == 1.0
    assert majority_success([("4", True), ("5", False), ("5", False)]) == 0.0
    assert majority_success([("4", True), ("5", False), (None, False)]) == 0.5
    assert majority_success([(None, False), (None, True)]) == 0.0


def test_mcnemar_is_the_share_of_sign_flips_at_least_as_uneven() -> None:
    for lost, won in product(range(6), repeat=2):
        flips = [abs(2 * sum(signs) - len(signs)) for signs in product((0, 1), repeat=lost + won)]
        expected = sum(each >= abs(lost - won) for each in flips) / len(flips)
        assert mcnemar(lost, won) == pytest.approx(expected, abs=1e-12)
