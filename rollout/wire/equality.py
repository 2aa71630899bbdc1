"""Equality of rewards and returns up to float32 rounding.

Rewards are stored as float32, and an episode may earn the same total in parts of different sizes: ten times 0.1, or
0.3 and 0.7. Such totals differ by rounding. A division by the standard deviation of a group would turn that difference
into an advantage, so all comparisons of rewards use this module.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

# Error of a sum of float32 numbers, relative to the sum of their magnitudes. Storing each number costs half of
# float32's epsilon; the rest covers environments that compute in float32.
RESOLUTION = 2 * float(np.finfo(np.float32).eps)


def bounds(
    values_M: ArrayLike, magnitudes_M: ArrayLike | None = None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return lower and upper bounds of the exact values, float64 [M] each.

    magnitudes_M: for each value the sum of the absolute values of its summands, which its rounding error depends on:
    0.1 + 0.2 - 0.3 is known to 1e-7 and not better. None: each value is a single stored number.
    """
    exact_M = np.asarray(values_M, np.float64)
    slack_M = RESOLUTION * np.abs(exact_M if magnitudes_M is None else np.asarray(magnitudes_M, np.float64))
    return exact_M - slack_M, exact_M + slack_M


def all_equal(values_M: ArrayLike, magnitudes_M: ArrayLike | None = None) -> bool:
    """Whether all values [M] may be roundings of one number; see `bounds`. True for no values, False with a NaN."""
    low_M, high_M = bounds(values_M, magnitudes_M)
    return low_M.size == 0 or bool(low_M.max() <= high_M.min())
