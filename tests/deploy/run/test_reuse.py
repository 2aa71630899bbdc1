"""Whole runs that train on groups of earlier steps again: how often, how old, and the same after a stop."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

from deploy.report.metrics import read_metrics
from deploy.run.replay import ReplayRuntime
from deploy.run.train import Training
from learner.data.advantage_log import read_advantages
from tests.deploy.small_run import (
    Stopped,
    assert_balanced,
    configured,
    late_engine,
    ledger,
    same_bits,
    train,
    trained_rows,
)

REUSING = (
    "buffer.reuse.groups=3",
    "buffer.reuse.limit=2",
    "buffer.reuse.max_lag=2",
    "buffer.reuse.sampler.kind=prioritized",
)
WITHOUT_ANY = {"groups_reused", "reused_lag_mean", "reused_lag_max"}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reusing") / "run"
    train(configured(*REUSING), folder)
    return folder


def reuses(folder: Path) -> list[tuple[int, int]]:
    """Version of the step, and group."""
    return ledger(folder, "SELECT version, group_id FROM reuses WHERE NOT discarded ORDER BY 1, 2")


def lags_of_reused(folder: Path) -> dict[int, list[int]]:
    """By version of the step, of every token it had once more: read from the rows."""
    sampled: dict[int, list[int]] = {}
    for row in trained_rows(folder):
        sampled.setdefault(row["group_id"], []).extend(row["versions"])
    lags: dict[int, list[int]] = {}
    for version, group_id in reuses(folder):
        lags.setdefault(version, []).extend(version - by for by in sampled[group_id])
    return lags


@pytest.mark.parametrize("after", [1, 3])
def test_a_resumed_run_reuses_the_same_groups_and_ends_with_the_same_bits(
    after: int, uninterrupted: Path, tmp_path: Path
) -> None:
    config, folder = configured(*REUSING), tmp_path / "run"
    with pytest.raises(Stopped):
        train(config, folder, stop_after=after)
    train(config, folder, resume=True)
    assert reuses(folder) == reuses(uninterrupted)
    assert same_bits(uninterrupted, folder)
    stood, went_on = (read_advantages(run).drop_columns("attempt") for run in (uninterrupted, folder))
    assert went_on.equals(stood), "every version once, to the bit"
    assert_balanced(folder, config)


def test_every_step_reuses_what_there_is_and_says_how_old_it_is(uninterrupted: Path, reference: Path) -> None:
    counted = Counter(version for version, _ in reuses(uninterrupted))
    assert counted == {1: 2, 2: 3, 3: 3}, "step 1 finds nothing, step 2 the two groups of step 1"
    lags = lags_of_reused(uninterrupted)
    for row in read_metrics(uninterrupted):
        version = row["step"] - 1
        if version not in counted:
            assert not WITHOUT_ANY & row.keys()
            continue
        assert row["groups_reused"] == counted[version]
        assert row["reused_lag_max"] == max(lags[version])
        assert row["reused_lag_mean"] == pytest.approx(sum(lags[version]) / len(lags[version]))
        fresh = [r for r in trained_rows(uninterrupted) if r["taken_version"] == version]
        assert row["batch_tokens_sampled"] > 0 and row["episodes"] == 8 and row["lag_max"] == 0
        assert row["reward"] == pytest.approx(sum(r["reward"] for r in fresh) / 8), (
            "of the fresh groups alone"
        )
    assert_balanced(uninterrupted, configured(*REUSING))
    assert not same_bits(reference, uninterrupted)


@pytest.mark.parametrize("sampler", ["fifo", "uniform"])
def test_no_group_is_reused_too_often_or_too_old_whatever_the_workers_speed(
    sampler: str, tmp_path: Path
) -> None:
    config = configured(
        "steps=7", "buffer.max_lag=1", "evaluation.tasks=0", "stages.0.source.episodes=4", "rollout.workers=2",
        "checkpoint.every_steps=3", "buffer.reuse.groups=4", "buffer.reuse.limit=2", "buffer.reuse.max_lag=3",
        f"buffer.reuse.sampler.kind={sampler}",
    )  # fmt: skip
    folder = tmp_path / "run"
    with pytest.raises(Stopped):
        train(config, folder, late_engine(1), stop_after=4)
    train(config, folder, late_engine(2), resume=True)
    assert_balanced(folder, config)
    first = dict(ledger(folder, "SELECT group_id, taken_version FROM groups"))
    steps: dict[int, list[int]] = {}
    for version, group_id in reuses(folder):
        assert first[group_id] < version
        steps.setdefault(group_id, []).append(version)
    assert max(map(len, steps.values())) == 2
    assert all(one < two for versions in steps.values() for one, two in pairwise(versions))
    lags = lags_of_reused(folder)
    assert 1 <= max(map(max, lags.values())) <= 3
    said = {row["step"] - 1: row["reused_lag_max"] for row in read_metrics(folder) if "groups_reused" in row}
    assert said == {version: max(each) for version, each in lags.items()}


def test_without_reuse_its_other_options_change_nothing(reference: Path, tmp_path: Path) -> None:
    others = [option for option in REUSING if ".groups=" not in option]
    train(configured("buffer.reuse.groups=0", *others), tmp_path / "off")
    assert same_bits(reference, tmp_path / "off")
    assert reuses(tmp_path / "off") == []
    rows = [[row.keys() for row in read_metrics(folder)] for folder in (reference, tmp_path / "off")]
    assert rows[0] == rows[1] and not WITHOUT_ANY & rows[0][0]


def test_a_replay_reuses_what_the_run_reused(uninterrupted: Path, tmp_path: Path) -> None:
    config = configured(f"replay={str(uninterrupted)!r}")
    train(config, tmp_path / "again", ring_type=lambda config, folder, _: ReplayRuntime(config, folder))
    assert same_bits(uninterrupted, tmp_path / "again")


def test_a_reused_token_older_than_its_bound_stops_the_run() -> None:
    driven = Training(configured(*REUSING), None, None)  # type: ignore[arg-type]
    driven._require_fresh({"step": 5.0, "lag_max": 0.0, "reused_lag_max": 2.0})
    with pytest.raises(
        RuntimeError, match=r"step 5 reused a token 3 versions old, but buffer.reuse.max_lag=2"
    ):
        driven._require_fresh({"step": 5.0, "lag_max": 0.0, "reused_lag_max": 3.0})
    with pytest.raises(RuntimeError, match=r"step 5 trained a token 1 versions old, but buffer.max_lag=0"):
        driven._require_fresh({"step": 5.0, "lag_max": 1.0})
