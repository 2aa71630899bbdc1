"""Order in which a stage uses its items: all of them once an epoch, in a new random order, so many a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")


class Epochs:
    """The order of every epoch, drawn at once; the last step of an epoch may have fewer items."""

    def __init__(self, items: int, epochs: int, items_per_step: int, rng: np.random.Generator) -> None:
        self._size = items_per_step
        self._steps_per_epoch = -(-items // items_per_step)
        self._orders = [rng.permutation(items) for _ in range(epochs)]

    def epoch(self, step: int) -> int:
        """The pass over the items that a step belongs to, from 0."""
        return step // self._steps_per_epoch

    def chosen(self, step: int, items: Sequence[T]) -> list[T]:
        """The items of a step."""
        part = step % self._steps_per_epoch
        places = self._orders[self.epoch(step)][part * self._size : (part + 1) * self._size]
        return [items[place] for place in places]
