"""The ledger as a person with sqlite3 finds it."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rollout.buffer.ledger import EpisodeRow, Ledger, StoredGroup
from rollout.buffer.segments import Location
from rollout.wire.policies import Opponent
from rollout.wire.trajectory import DropReason, EndReason, Group, Slot, Task

PLACE = Location(3, 400, 50, "a" * 32)


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    opened = Ledger(tmp_path / "ledger.sqlite")
    yield opened
    opened.close()


def rows(folder: Path, query: str) -> list[tuple[Any, ...]]:
    db = sqlite3.connect(folder / "ledger.sqlite")
    found = db.execute(query).fetchall()
    db.close()
    return found


def test_an_outsider_reads_every_fate_while_the_run_writes(
    tmp_path: Path, ledger: Ledger, group_of: Callable[..., Group]
) -> None:
    task, against = (
        Task.of("count", 9, {"size": 4}),
        [None, Opponent("solver", 1), None, Opponent("asker", 0)],
    )
    slots = [Slot(index, 0, task, 2, "asker", opponent) for index, opponent in enumerate(against)]
    for slot in slots:
        ledger.issue(slot, "rollout-1", worker_loop=4)
    owners = "SELECT policy, opponent, opponent_version FROM groups ORDER BY group_id"
    assert rows(tmp_path, owners) == [
        ("asker", None, None),
        ("asker", "solver", 1),
        ("asker", None, None),
        ("asker", "asker", 0),
    ]
    group = group_of(slots[0], versions=5, end_reasons=(EndReason.TERMINATED, EndReason.FAILED))
    episodes = [EpisodeRow.of(trajectory) for trajectory in group.trajectories]
    ledger.complete([(slots[0], PLACE, episodes), (slots[1], PLACE, episodes)])
    ledger.take([0], version=3)
    ledger.drop(slots[2], DropReason.FAILED, "no route to host", episodes[1:])
    columns = "group_id, attempt, env_options, seed, worker, state, reason, error, taken_version"
    sums = "episodes, tokens, reward_sum"
    common = (0, '{"size": 4}', 9, "rollout-1")
    assert rows(tmp_path, f"SELECT {columns}, {sums} FROM groups ORDER BY group_id") == [
        (0, *common, "taken", None, None, 3, 2, 6, 1.0),
        (1, *common, "complete", None, None, None, 2, 6, 1.0),
        (2, *common, "dropped", "failed", "no route to host", None, None, None, None),
        (3, *common, "issued", None, None, None, None, None, None),
    ]
    assert rows(tmp_path, "SELECT * FROM episodes WHERE group_id IN (0, 2)") == [
        (0, 0, 0, "terminated", 0.5, None, 1, 3, 5, None),
        (0, 0, 1, "failed", 0.5, None, 1, 3, 5, None),
        (2, 0, 1, "failed", 0.5, None, 1, 3, 5, None),
    ]
    assert ledger.counts() == {
        "issued": 4,
        "in_flight": 3,
        "complete": 1,
        "taken": 1,
        "trained": 0,
        "dropped": 1,
    }
    assert ledger.since(3) == [
        StoredGroup(slots[0], "taken", "rollout-1", 4, 3, 5, PLACE),
        StoredGroup(slots[1], "complete", "rollout-1", 4, None, 5, PLACE),
        StoredGroup(slots[3], "issued", "rollout-1", 4, None, None, None),
    ]
    assert [stored.slot.group_id for stored in ledger.since(4)] == [1, 3], (
        "a checkpoint of version 4 has group 0"
    )


def test_a_checkpoint_trains_what_was_taken_before_it(tmp_path: Path, ledger: Ledger) -> None:
    for version in range(3):
        ledger.issue(Slot(version, 0, Task.of("count", 0), version), "w", 0)
        ledger.take([version], version)
    ledger.checkpointed(2)
    assert rows(tmp_path, "SELECT state FROM groups ORDER BY group_id") == [
        ("trained",),
        ("trained",),
        ("taken",),
    ]


def test_issuing_again_begins_with_a_clean_row_and_keeps_the_old_episodes(
    tmp_path: Path, ledger: Ledger, group_of: Callable[..., Group]
) -> None:
    slot = Slot(0, 0, Task.of("count", 9), 2)
    ledger.issue(slot, "w0", 0)
    ledger.complete([(slot, PLACE, [EpisodeRow.of(t) for t in group_of(slot).trajectories])])
    ledger.take([0], 2)
    ledger.reissue([0], journal_from=7)
    assert (ledger.counts()["in_flight"], ledger.journal_from) == (1, 7)
    ledger.issue(Slot(0, 1, slot.task, 4), "w1", 0)
    assert ledger.since(0) == [StoredGroup(Slot(0, 1, slot.task, 4), "issued", "w1", 0, None, None, None)]
    assert rows(tmp_path, "SELECT worker, taken_version, tokens FROM groups") == [("w1", None, None)]
    assert rows(tmp_path, "SELECT DISTINCT attempt FROM episodes") == [(0,)]


def test_a_failing_call_leaves_nothing_behind(ledger: Ledger, group_of: Callable[..., Group]) -> None:
    slots = [Slot(index, 0, Task.of("count", 9), 0) for index in range(2)]
    for slot in slots:
        ledger.issue(slot, "w", 0)
    episode = EpisodeRow.of(group_of(slots[0]).trajectories[0])
    with pytest.raises(sqlite3.IntegrityError):
        ledger.complete([(slots[0], PLACE, [episode]), (slots[1], PLACE, [episode, episode])])
    assert [stored.location for stored in ledger.since(0)] == [None, None]
    ledger.complete([(slots[0], PLACE, [episode])])


@pytest.mark.parametrize("version", [1, 7])
def test_a_ledger_of_another_version_is_refused(version: int, tmp_path: Path) -> None:
    db = sqlite3.connect(tmp_path / "ledger.sqlite")
    db.execute(f"PRAGMA user_version={version}")
    db.close()
    with pytest.raises(
        ValueError, match=r"ledger\.sqlite: a ledger of version \d, but this Manta reads version 3"
    ):
        Ledger(tmp_path / "ledger.sqlite")
