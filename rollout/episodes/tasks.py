"""The stream of tasks a run trains on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rollout.engines.engine import derive_seed
from rollout.wire.trajectory import Task

SEEDS = 2**30


class TaskStream:
    """Group id to task: a pure function of (run seed, group id), so that a resumed run needs no position.

    Task seeds are drawn from [first_seed, first_seed + 2**30). The default leaves every seed below 2**30 to held-out
    tasks and stays under 2**31, which any environment's random generator accepts.
    """

    def __init__(
        self, env_id: str, options: Mapping[str, Any] | None = None, seed: int = 0, first_seed: int = SEEDS
    ) -> None:
        self._base = Task.of(env_id, 0, options)
        self._seed = seed
        self._first_seed = first_seed

    def __call__(self, group_id: int) -> Task:
        place = derive_seed(self._seed, group_id) % SEEDS
        return Task(self._base.env_id, self._first_seed + place, self._base.options)
