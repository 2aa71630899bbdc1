"""Equality of rewards and returns: what float32 cannot tell apart is equal.

Rewards are stored as float32, and an episode may earn the same total in parts of different sizes: ten times 0.1, or
0.3 and 0.7. Such totals differ by rounding, and a division by the deviation of a group would make an advantage of that.
Every question whether rewards are equal is asked here.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

# Of a sum of float32 numbers, relative to the sum of their magnitudes. Storing each costs half of float32's epsilon;
# the rest is for an environment that computes in float32 itself.
RESOLUTION = 2 * float(np.finfo(np.float32).eps)


def bounds(
    values_M: ArrayLike, magnitudes_M: ArrayLike | None = None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Where the exact values may lie: lower and upper bounds, float64 [M] each.

    magnitudes_M: for each value the sum of the absolute values that it is the sum of, on which its rounding depends:
    0.1 + 0.2 - 0.3 is known to 1e-7 and not better. None: each value was stored as it is.
    """
    exact_M = np.asarray(values_M, np.float64)
    slack_M = RESOLUTION * np.abs(exact_M if magnitudes_M is None else np.asarray(magnitudes_M, np.float64))
    return exact_M - slack_M, exact_M + slack_M


def all_equal(values_M: ArrayLike, magnitudes_M: ArrayLike | None = None) -> bool:
    """Whether one exact number could be behind all values, [M]; see `bounds`. Nothing at all is equal, NaN never is."""
    low_M, high_M = bounds(values_M, magnitudes_M)
    return low_M.size == 0 or bool(low_M.max() <= high_M.min())
