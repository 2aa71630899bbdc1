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
    """Group id to task: a pure function of (run seed, group id), so that a resumed run needs no position.

    Task seeds are drawn from [first_seed, first_seed + 2**30). The default leaves every seed below 2**30 to held-out
    tasks and stays under 2**31, which any environment's random generator accepts. Of an environment with `count` tasks,
    numbered by the seed modulo that, each is played once before any is played again, in another order each time.
    """

    def __init__(
        self,
        env_id: str,
        options: Mapping[str, Any] | None = None,
        seed: int = 0,
        first_seed: int = SEEDS,
        count: int | None = None,
    ) -> None:
        self._base = Task.of(env_id, 0, options)
        self._seed = seed
        self._first_seed = first_seed
        self._count = count

    def __call__(self, group_id: int) -> Task:
        place = derive_seed(self._seed, group_id) % SEEDS if self._count is None else self._counted(group_id)
        return Task(self._base.env_id, self._first_seed + place, self._base.options)

    def _counted(self, group_id: int) -> int:
        """The place of a task whose number, the seed modulo the count, comes once in each pass."""
        assert self._count is not None
        passes, place = divmod(group_id, self._count)
        number = int(_order(self._seed, passes, self._count)[place])
        return (number - self._first_seed) % self._count + passes % (SEEDS // self._count) * self._count


@lru_cache(maxsize=4)
def _order(seed: int, passes: int, count: int) -> NDArray[np.int64]:
    """The numbers of all tasks in the order of one pass."""
    return np.random.default_rng(derive_seed(seed, passes)).permutation(count)
