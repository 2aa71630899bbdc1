"""Agreement of annotators."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from math import fsum


def krippendorff_alpha(units: Iterable[Sequence[Hashable]]) -> float | None:
    """Krippendorff's alpha for nominal values: 1 is perfect agreement, 0 that of chance, below 0 less than that.

    units: of each unit the values that its annotators gave, any number of them; a unit with fewer than two is left out.
    None if no unit is left, or all values are equal, for which it is undefined. Krippendorff, Computing Krippendorff's
    Alpha-Reliability (2011), section C.
    """
    paired = [Counter(values) for values in units if len(values) > 1]
    totals = sum(paired, Counter())
    count = totals.total()
    # Pairs of different values: observed within units, and expected if values were dealt to units at random.
    observed = fsum(_different(unit) / (unit.total() - 1) for unit in paired)
    expected = _different(totals)
    return 1 - (count - 1) * observed / expected if expected else None


def _different(values: Counter[Hashable]) -> int:
    """Ordered pairs of two different values."""
    return values.total() ** 2 - sum(count**2 for count in values.values())
