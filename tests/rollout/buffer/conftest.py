"""A store in a folder of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from rollout.buffer.disk_space import free_bytes
from rollout.buffer.replay_store import BufferSettings, Store
from rollout.wire.trajectory import Task


@pytest.fixture
def open_store(tmp_path: Path, tasks: Callable[[int], Task]) -> Callable[..., Store]:
    def make(
        groups_per_step: int = 2,
        max_lag: int = 1,
        probe: Callable[[Path], int] = free_bytes,
        **more: float,
    ) -> Store:
        total_steps = more.pop("total_steps", None)
        return Store(
            tmp_path,
            tasks,
            BufferSettings(groups_per_step=groups_per_step, max_lag=max_lag, **more),
            total_steps and int(total_steps),
            probe,
        )

    return make
