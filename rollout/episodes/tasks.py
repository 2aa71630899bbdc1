"""The stream of tasks a run trains on."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rollout.engines.engine import derive_seed
from rollout.wire.trajectory import Task

SEEDS = 2**30


class TaskStream:
    """Task of a group id: a pure function of (run seed, group id), so that a resumed run needs no cursor.

    Task seeds are drawn from [first_seed, first_seed + 2**30). The default leaves all seeds below 2**30 to held-out
    tasks and stays under 2**31, which any environment's random generator accepts. An environment with
    `count` tasks, numbered by the seed modulo the count, plays each once per pass: in another order each time, or
    without `shuffle` in the order of their numbers.
    """

    def __init__(
        self,
        env_id: str,
        options: Mapping[str, Any] | None = None,
        seed: int = 0,
        first_seed: int = SEEDS,
        count: int | None = None,
        shuffle: bool = True,
    ) -> None:
        self._base = Task.of(env_id, 0, options)
        self._seed = seed
        self._first_seed = first_seed
        self._count = count
        self._shuffle = shuffle

    def __call__(self, group_id: int) -> Task:
        offset = derive_seed(self._seed, group_id) % SEEDS if self._count is None else self._counted(group_id)
        return Task(self._base.env_id, self._first_seed + offset, self._base.options)

    def _counted(self, group_id: int) -> int:
        """Offset of a task whose number (the seed modulo the count) comes once per pass."""
        assert self._count is not None
        passes, offset = divmod(group_id, self._count)
        number = int(_order(self._seed, passes, self._count)[offset]) if self._shuffle else offset
        return (number - self._first_seed) % self._count + passes % (SEEDS // self._count) * self._count


@lru_cache(maxsize=4)
def _order(seed: int, passes: int, count: int) -> NDArray[np.int64]:
    """Task numbers in the order of one pass."""
    return np.random.default_rng(derive_seed(seed, passes)).permutation(count)
