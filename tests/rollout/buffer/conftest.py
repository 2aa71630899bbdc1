"""A store in a folder of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from rollout.buffer.disk_space import free_bytes
from rollout.buffer.replay_store import BufferSettings, ReplayStore
from rollout.wire.trajectory import Task


@pytest.fixture
def open_store(tmp_path: Path, tasks: Callable[[int], Task]) -> Callable[..., ReplayStore]:
    def make(
        groups_per_step: int = 2,
        max_lag: int = 1,
        probe: Callable[[Path], int] = free_bytes,
        **more: float,
    ) -> ReplayStore:
        total_steps = more.pop("total_steps", None)
        return ReplayStore(
            tmp_path,
            tasks,
            BufferSettings(groups_per_step=groups_per_step, max_lag=max_lag, **more),
            total_steps and int(total_steps),
            probe,
        )

    return make
