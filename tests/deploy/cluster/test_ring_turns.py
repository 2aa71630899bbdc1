"""Engines and learner in turns, as actors: parts that are killed while they are away come back, and nothing changes."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deploy.assembly.build import EngineFactory
from deploy.config.config import RunConfig
from deploy.report.metrics import read_metrics
from tests.deploy.small_run import assert_balanced, configured, same_bits, train

TURNS = configured(
    "cluster.colocate=turns", "engine.kind=transformers", "supervision.heartbeat_interval_seconds=0.5"
)


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    import ray

    from deploy.cluster.connect import connect

    connect(TURNS)
    yield
    ray.shutdown()


def _struck(config: RunConfig, folder: Path, engine: EngineFactory) -> Any:
    """A ring whose engine is killed while it sleeps, in step 1, and whose learner while it is away, in step 3."""
    from deploy.cluster.cluster import RayRuntime

    ring = RayRuntime(config, folder, engine)
    start, step, asked = ring.start, ring.step, list[int]()

    def kill(name: str) -> None:
        (pid,) = [part["pid"] for part in ring.roster() if part["part"].startswith(name)]
        os.kill(pid, signal.SIGKILL)

    async def started(resume: bool) -> int:
        version = await start(resume)
        turns = ring._turns
        assert turns is not None
        onload = turns._onload

        async def struck() -> None:
            if asked == [1]:
                kill("rollout-0")
            await onload()

        turns._onload = struck
        return version

    async def stepped(number: int, before_publish: Any = None, saves: bool = False) -> Any:
        asked.append(number)
        if asked == [1, 2, 3]:
            await ring.landed()  # a checkpoint on its way would be none
            kill("learner")
        return await step(number, before_publish, saves)

    ring.start, ring.step = started, stepped  # type: ignore[method-assign]
    return ring


@pytest.mark.rare
def test_parts_that_are_killed_in_the_others_turn_change_nothing(reference: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train(TURNS, folder, ring_type=_struck)
    assert same_bits(reference, folder)
    assert_balanced(folder, TURNS)
    assert [row["step"] for row in read_metrics(folder)] == [1, 2, 3, 4]
    losses = (folder / "losses.jsonl").read_text().splitlines()
    assert ["rollout-0" in losses[0], "learner" in losses[1], len(losses)] == [True, True, 2]
