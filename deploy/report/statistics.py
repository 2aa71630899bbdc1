"""Confidence intervals of proportions and means."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

import numpy as np

Z_95 = 1.96  # standard normal quantile of a two-sided 95% interval
RESAMPLES = 2000


def wilson_interval(successes: int, n: int, z: float = Z_95) -> tuple[float, float]:
    """The Wilson score interval of a success probability, given `successes` of `n` independent trials.

    Unlike the normal approximation it stays within 0..1 and has a positive width at 0 and n successes.
    ValueError unless 0 <= successes <= n and n > 0.

    E. B. Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22 (1927);
    L. D. Brown, T. T. Cai, A. DasGupta, "Interval estimation for a binomial proportion", Statistical Science 16 (2001).
    """
    if n <= 0 or not 0 <= successes <= n:
        raise ValueError(f"an interval needs 0 <= successes <= n and n > 0, got successes={successes}, n={n}")
    share = successes / n
    shrink = 1 + z**2 / n
    centre = (share + z**2 / (2 * n)) / shrink
    half = z / shrink * sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    # At 0 and n successes one end is exact; the arithmetic may miss it by a rounding error.
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == n else centre + half
    return low, high


def bootstrap_interval(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """The 95% percentile bootstrap interval of the mean of independent values; deterministic for a seed.

    Fewer than about 20 values make it too narrow. ValueError without values.

    B. Efron, R. J. Tibshirani, "An Introduction to the Bootstrap" (1993), chapter 13.
    """
    if not values:
        raise ValueError("an interval needs one value or more")
    sample, rng = np.asarray(values, np.float64), np.random.default_rng(seed)
    means = [sample[rng.integers(len(sample), size=len(sample))].mean() for _ in range(RESAMPLES)]
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)
