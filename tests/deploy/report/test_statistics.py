from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.report.statistics import bootstrap_interval, wilson_interval


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
    ours = bootstrap_interval(values.tolist())
    error = 1.96 * values.std(ddof=1) / 400**0.5
    assert ours == pytest.approx((values.mean() - error, values.mean() + error), abs=0.15 * error)
    assert bootstrap_interval(values.tolist()) == ours
    assert bootstrap_interval([0.5]) == (0.5, 0.5)
    with pytest.raises(ValueError, match="one value or more"):
        bootstrap_interval([])
