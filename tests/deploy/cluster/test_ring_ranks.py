"""The ring with a learner of two ranks, in real actors: it trains, its books balance, and it survives one of them."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ray.exceptions import RayActorError

from deploy.assembly.build import EngineFactory
from deploy.cluster.control import read_roster
from deploy.config.config import RunConfig
from deploy.config.config_errors import ConfigError
from deploy.config.declared_metrics import is_declared
from deploy.config.load import moved
from deploy.report.metrics import read_metrics
from deploy.run.local import LocalRuntime
from tests.deploy.small_run import (
    Stopped,
    assert_balanced,
    configured,
    late_engine,
    ledger,
    train,
    trained_rows,
)

RANKS = configured(
    "learner.ranks=2",
    "buffer.groups_per_step=3",
    "cluster.learner_cpus=0.5",
    "rollout.cpus_per_worker=0.5",
    "evaluation.tasks=0",
    "stages.0.source.episodes=16",
    "checkpoint.every_steps=1",
    "checkpoint.keep=9",
    "supervision.heartbeat_interval_seconds=0.5",
)


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    import ray

    from deploy.cluster.connect import connect

    connect(RANKS)
    yield
    ray.shutdown()


def _ring(config: RunConfig, folder: Path, engine: EngineFactory) -> Any:
    from deploy.cluster.cluster import RayRuntime

    return RayRuntime(config, folder, engine)


def _assert_trained(folder: Path) -> None:
    assert_balanced(folder, RANKS)
    rows = read_metrics(folder)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for row in rows:
        taken = [r for r in trained_rows(folder) if r["taken_version"] == row["step"] - 1]
        episodes = {(r["group_id"], r["episode"]) for r in taken}
        # What both ranks trained, said by one of them.
        assert row["episodes"] == len(episodes) == 3 * RANKS.rollout.group_size
        sampled = sum(len(r["action_ids"]) for r in taken)
        assert row["sampled_per_episode"] == pytest.approx(sampled / len(episodes))
        assert row["reward"] == pytest.approx(sum(r["reward"] for r in taken) / len(episodes))
        assert np.isfinite(row["grad_norm"])
        assert row["workers"] == RANKS.rollout.workers and all(map(is_declared, row))
    assert any(row["grad_norm"] > 0 for row in rows)


@pytest.mark.rare
def test_two_ranks_train_and_every_group_is_accounted_for(tmp_path: Path) -> None:
    train(RANKS, tmp_path / "run", late_engine(0), ring_type=_ring)
    _assert_trained(tmp_path / "run")


@pytest.mark.rare
def test_two_ranks_that_share_rows_go_on_with_rows_of_their_own(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    together = moved(RANKS, ["learner.context_parallel_size=2"])
    with pytest.raises(Stopped):
        train(together, folder, late_engine(0), ring_type=_ring, stop_after=2)
    train(RANKS, folder, late_engine(0), ring_type=_ring, resume=True)
    _assert_trained(folder)


def test_what_two_ranks_began_one_ends(tmp_path: Path) -> None:
    folder, started_with = tmp_path / "run", []

    def watched(config: RunConfig, folder: Path, engine: EngineFactory) -> Any:
        ring = _ring(config, folder, engine)
        step = ring.step

        async def looked_at(number: int, before_publish: Any = None, saves: bool = False) -> Any:
            pids = [part["pid"] for part in ring.roster() if "learner" in part["part"]]
            started_with.append([Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") for pid in pids])
            return await step(number, before_publish, saves)

        ring.step = looked_at
        return ring

    with pytest.raises(Stopped):
        train(RANKS, folder, late_engine(0), ring_type=watched, stop_after=2)
    assert len(started_with[0]) == 2
    # What the C library reads is there when the process starts.
    assert all(b"MALLOC_ARENA_MAX=1" in variables for variables in started_with[0])
    alone = moved(RANKS, ["learner.ranks=1"])
    train(alone, folder, late_engine(0), ring_type=_ring, resume=True)
    _assert_trained(folder)
    assert {part["part"] for part in read_roster(folder) if "learner" in part["part"]} == {"learner"}


@pytest.mark.slow
@pytest.mark.rare
def test_a_rank_that_is_lost_takes_the_others_back_to_the_checkpoint(tmp_path: Path) -> None:
    folder, seen = tmp_path / "run", []
    hits = {2: signal.SIGKILL, 4: signal.SIGSTOP}  # by the number of steps that were asked for before

    def hit(config: RunConfig, folder: Path, engine: EngineFactory) -> Any:
        ring = _ring(config, folder, engine)
        step, start, failures = ring.step, ring._start_learner, [RayActorError()]

        async def started(load: bool) -> Any:
            if load and failures:  # the first restart meets a node that is being lost
                raise failures.pop()
            return await start(load)

        ring._start_learner = started

        async def struck(number: int, before_publish: Any = None, saves: bool = False) -> Any:
            pids = {part["part"]: part["pid"] for part in ring.roster() if "learner" in part["part"]}
            if len(seen) in hits:
                await ring.landed()  # a checkpoint on its way would be none
                os.kill(pids["learner-1"], hits[len(seen)])
            seen.append((number, pids))
            return await step(number, before_publish, saves)

        ring.step = struck
        return ring

    frozen = RANKS.supervision.model_copy(update={"heartbeat_timeout_seconds": 4.0})
    config = RANKS.model_copy(update={"supervision": frozen, "stages": ()})
    train(config, folder, late_engine(1), ring_type=hit)
    _assert_trained(folder)
    assert [number for number, _ in seen] == [1, 2, 3, 3, 4, 4]
    for before, after in ((2, 3), (4, 5)):  # nobody of those before goes on
        assert not set(seen[before][1].values()) & set(seen[after][1].values())
    assert ledger(folder, "SELECT count(*) FROM groups WHERE state <> 'trained'") == [(0,)]


def test_one_process_is_no_two_ranks(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^learner.ranks=2 are processes of their own: [^\n]*$"):
        LocalRuntime(RANKS, tmp_path)
