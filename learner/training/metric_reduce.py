"""What a step says of its tokens: statistics that arrive row by row, as one number over all rows and ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from learner.algorithm.corrections import effective_sample_share
from learner.parallel.ranks import ALONE, Ranks


@dataclass(frozen=True, slots=True)
class Part:
    """A statistic of some of a row's tokens."""

    values_N: Tensor  # zeros for the tokens that are not meant
    tokens: int  # that are meant


@dataclass(frozen=True, slots=True)
class Ratios:
    """Importance ratios, whose effective sample size is wanted as a share of ALL tokens of the step.

    A mean of rows' shares would depend on which tokens share a row, and call rows that agree in themselves but not with
    one another a full sample.
    """

    part: Part


Statistic = Tensor | Part | Ratios  # a tensor, float [M]: to be averaged over its entries


class Means:
    """Statistics that arrive in parts; nothing waits for the device before `values`."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._squares: dict[str, Tensor] = {}  # of ratios
        self._counts: dict[str, int] = {}

    def add(self, stats: Mapping[str, Statistic]) -> None:
        """Take in one part of each."""
        for name, statistic in stats.items():
            part = statistic.part if isinstance(statistic, Ratios) else statistic
            values_M, count = (
                (part, part.numel()) if isinstance(part, Tensor) else (part.values_N, part.tokens)
            )
            _add(self._sums, name, values_M)
            self._counts[name] = self._counts.get(name, 0) + count
            if isinstance(statistic, Ratios):
                _add(self._squares, name, values_M.double().square())

    def values(self, ranks: Ranks = ALONE) -> dict[str, float]:
        """The means and shares over all ranks; a name of which no rank had a token has none."""
        sums = ranks.sums({name: float(value) for name, value in self._sums.items()})
        squares = ranks.sums({name: float(value) for name, value in self._squares.items()})
        counts = ranks.sums(self._counts)
        found = {}
        for name, count in counts.items():
            if count and name in squares:
                found[name] = effective_sample_share(sums[name], squares[name], count)
            elif count:
                found[name] = sums[name] / count
        return found


def _add(sums: dict[str, Tensor], name: str, values_M: Tensor) -> None:
    total = values_M.sum(dtype=torch.float64)
    sums[name] = sums[name] + total if name in sums else total
