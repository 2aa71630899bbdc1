"""Every trained token's advantage stands beside the version that trained it, once, whatever was done again."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from learner.data.advantage_log import FOLDER, SCHEMA, AdvantageLog, read_advantages
from learner.settings import LearnerSettings
from learner.training.learner import Learner
from rollout.wire.schema import encode
from rollout.wire.trajectory import Group

Groups = Callable[..., Group]


def _learner(tiny: Path, run: Path, **settings: bool) -> Learner:
    learner = Learner(LearnerSettings.model_validate({"model": {"path": str(tiny)}, **settings}))
    learner.keep_advantages(run)
    return learner


def test_advantages_join_with_the_stored_rows_turn_by_turn(
    tiny: Path, group_of: Groups, tmp_path: Path
) -> None:
    # Rewards 1 and 0: advantages 1 and -1; the second group is even, and reused.
    groups = [group_of(0, [1.0, 0.0], turns=2), replace(group_of(1, [0.5, 0.5]), reuse=2)]
    _learner(tiny, tmp_path).step(groups)
    rows = read_advantages(tmp_path)
    assert rows.schema.equals(SCHEMA)
    stored = [row for each in groups for row in encode(each).to_pylist()]
    keys = ("group_id", "attempt", "episode", "turn")
    assert [[row[key] for key in keys] for row in rows.to_pylist()] == [
        [row[key] for key in keys] for row in stored
    ]
    for row, turn in zip(rows.to_pylist(), stored, strict=True):
        expected = 0.0 if row["group_id"] else (1.0, -1.0)[row["episode"]]
        np.testing.assert_allclose(row["advantages"], [expected] * len(turn["action_ids"]), rtol=1e-5)
        assert (row["version"], row["reuse"]) == (1, 2 if row["group_id"] else 0)


def test_a_step_that_is_done_again_stands_there_once(tiny: Path, group_of: Groups, tmp_path: Path) -> None:
    learner = _learner(tiny, tmp_path)
    learner.step([group_of(0, [1.0, 0.0])])
    learner.save(tmp_path)
    for group_id in (1, 2):
        learner.step([group_of(group_id, [1.0, 0.0])])
    (tmp_path / FOLDER / "version-00000003.part").write_bytes(b"torn")
    (tmp_path / FOLDER / "version-00000003-rank-1.arrow").write_bytes(b"of a rank that is no more")
    again = Learner(LearnerSettings.model_validate({"model": {"path": str(tiny)}}))
    again.load(tmp_path)
    again.keep_advantages(tmp_path)
    again.step([group_of(7, [0.0, 1.0])])
    rows = read_advantages(str(tmp_path)).to_pylist()
    assert {(row["version"], row["group_id"]) for row in rows} == {(1, 0), (2, 7)}


def test_a_full_disk_loses_the_file_alone(
    tiny: Path,
    group_of: Groups,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    learner = _learner(tiny, tmp_path)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("learner.data.advantage_log.os.fsync", full)
    with caplog.at_level(logging.WARNING):
        learner.step([group_of(0, [1.0, 0.0])])
    assert "the advantages of version 1 are not stored: [Errno 28]" in caplog.text
    assert not list((tmp_path / FOLDER).iterdir()) and read_advantages(tmp_path).num_rows == 0


def test_nothing_is_stored_where_that_is_not_asked(tiny: Path, group_of: Groups, tmp_path: Path) -> None:
    _learner(tiny, tmp_path, store_advantages=False).step([group_of(0, [1.0, 0.0])])
    assert not (tmp_path / FOLDER).exists()


def test_every_rank_has_a_file_of_its_own(group_of: Groups, tmp_path: Path) -> None:
    for rank in (0, 1):
        group = group_of(rank, [1.0, 0.0])
        advantages = [np.full(t.num_sampled, rank, np.float32) for t in group.trainable]
        AdvantageLog(tmp_path, 0, rank).write(1, [group], advantages)
    rows = read_advantages(tmp_path).to_pylist()
    assert sorted({row["group_id"] for row in rows}) == [0, 1]
    assert all(set(row["advantages"]) == {row["group_id"]} for row in rows)
