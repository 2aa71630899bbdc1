"""Evaluations during a run on Ray: by all workers, each of one version, while training goes on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deploy.report.metrics import read_metrics
from rollout.buffer.segments import read_rows
from tests.deploy.small_run import assert_balanced, configured, largest_lag, train, trained_rows

# 128 episodes an evaluation are two shards, one a worker.
EPISODES = 128
CONFIG = configured(
    "steps=6",
    "buffer.max_lag=1",
    "rollout.workers=2",
    "rollout.cpus_per_worker=0.5",
    "cluster.learner_cpus=0.5",
    "evaluation={tasks=4, samples=32, every_steps=2, options={split='heldout'}}",
    "stages.0.source.episodes=16",
    "checkpoint.every_steps=6",
)
WHEN = {0: "before", 2: "step-00000002", 4: "step-00000004", 6: "after"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    import ray

    from deploy.cluster.cluster import RayRuntime
    from deploy.cluster.connect import connect

    folder = tmp_path_factory.mktemp("evaluated on ray") / "run"
    connect(CONFIG)
    try:
        train(CONFIG, folder, ring_type=RayRuntime)
    finally:
        ray.shutdown()
    yield folder


def evaluated(run: Path, when: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = read_rows(run / "evaluations" / when).to_pylist()
    return rows


@pytest.mark.slow
def test_every_token_of_an_evaluation_is_of_its_version_whichever_worker_plays_it(run: Path) -> None:
    for version, when in WHEN.items():
        rows = evaluated(run, when)
        ends = [row for row in rows if row["end_reason"]]
        assert len(ends) == len({(row["seed"], row["episode"]) for row in ends}) == EPISODES
        assert {sampled for row in rows for sampled in row["versions"]} == {version}
        assert {row["worker"] for row in rows} == {"rollout-0", "rollout-1"}
        (metrics,) = [row for row in read_metrics(run / "evaluations") if row["step"] == version]
        assert metrics["eval_success"] == pytest.approx(sum(bool(row["success"]) for row in ends) / EPISODES)


@pytest.mark.slow
def test_training_goes_on_meanwhile_and_the_next_version_waits(run: Path) -> None:
    waited = {row["step"]: "eval_wait_s" in row for row in read_metrics(run)}
    assert waited == {1: False, 2: False, 3: True, 4: False, 5: True, 6: False}
    assert_balanced(run, CONFIG)
    assert largest_lag(run) <= 1
    assert {version for row in trained_rows(run) for version in row["versions"]} <= set(range(6))
