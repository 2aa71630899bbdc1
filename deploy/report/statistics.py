"""Estimators of evaluations: confidence intervals, pass@k, majority votes, paired differences."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from math import comb, prod, sqrt

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


def clustered_interval(clusters: Sequence[Sequence[float]], seed: int = 0) -> tuple[float, float]:
    """The 95% percentile bootstrap interval of the mean of values that depend on one another within a cluster.

    clusters: the values of each task, one or more; whole tasks are resampled, and with one value a task this is the
    ordinary bootstrap. Deterministic for a seed. Fewer than about 20 tasks make it too narrow. ValueError without
    values.

    B. Efron, R. J. Tibshirani, "An Introduction to the Bootstrap" (1993), chapter 13; A. C. Davison, D. V. Hinkley,
    "Bootstrap Methods and their Application" (1997), section 3.8, on clusters.
    """
    if not clusters:
        raise ValueError("an interval needs one value or more")
    sums, counts = (np.array([of(each) for each in clusters], np.float64) for of in (sum, len))
    rng, size = np.random.default_rng(seed), len(clusters)
    drawn = (rng.integers(size, size=size) for _ in range(RESAMPLES))
    low, high = np.quantile([sums[each].sum() / counts[each].sum() for each in drawn], [0.025, 0.975])
    return float(low), float(high)


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """The probability that one of k samples of a task is right, estimated from `samples` of which `correct` are.

    Unbiased: 1 - C(n-c, k) / C(n, k), as a product that does not overflow. ValueError unless 0 <= c <= n and
    1 <= k <= n.

    M. Chen et al., "Evaluating Large Language Models Trained on Code", arXiv:2107.03374 (2021), equation 1.
    """
    if not (0 <= correct <= samples and 1 <= k <= samples):
        raise ValueError(f"pass@{k} needs 0 <= correct={correct} <= samples={samples} and 1 <= k <= samples")
    if samples - correct < k:
        return 1.0
    return 1.0 - prod(1.0 - k / each for each in range(samples - correct + 1, samples + 1))


def majority_success(votes: Sequence[tuple[str | None, bool]]) -> float:
    """Whether the answer with most votes is right. votes: (answer, right) of each sample; None votes for nothing.

    Of several answers with the most votes each is as likely to be chosen. 0 without votes.

    X. Wang et al., "Self-Consistency Improves Chain of Thought Reasoning in Language Models", arXiv:2203.11171 (2022).
    """
    right: Mapping[str, list[bool]] = defaultdict(list)
    for answer, correct in votes:
        if answer is not None:
            right[answer].append(correct)
    most = max(map(len, right.values()), default=0)
    winners = [sum(each) / len(each) for each in right.values() if len(each) == most]
    return sum(winners) / len(winners) if winners else 0.0


def mcnemar(lost: int, won: int) -> float:
    """The exact two-sided p-value of as many pairs lost and won, if each direction were as likely; 1 without pairs.

    Q. McNemar, "Note on the sampling error of the difference between correlated proportions", Psychometrika 12 (1947);
    the exact form is the binomial test of the discordant pairs.
    """
    pairs = lost + won
    tail = sum(comb(pairs, each) for each in range(min(lost, won) + 1))
    return min(1.0, 2 * tail / 2**pairs)
