"""The store's promises, one by one, where an example says more than the machine of test_store_machine.py."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from rollout.wire import segments
from rollout.wire.schema import decode, encode
from rollout.wire.segments import read_rows
from rollout.wire.store import BufferSettings, EpisodeRow, Store, TooManyFailures
from rollout.wire.trajectory import DropReason, EndReason, Group, Slot, Task

GroupOf = Callable[..., Group]
TasksOf = Callable[[int], Task]
Open = Callable[..., Store]


@pytest.fixture
def open_store(tmp_path: Path, tasks: TasksOf) -> Open:
    def make(groups_per_step: int = 2, max_lag: int = 1, **more: float) -> Store:
        total_steps = more.pop("total_steps", None)
        return Store(
            tmp_path,
            tasks,
            BufferSettings(groups_per_step=groups_per_step, max_lag=max_lag, **more),
            total_steps and int(total_steps),
        )

    return make


def rows_of(group: Group) -> list[EpisodeRow]:
    return [EpisodeRow.of(trajectory) for trajectory in group.trajectories]


def hand_in(store: Store, group: Group) -> None:
    store.add(group.slot, encode(group), rows_of(group))


def reserve(store: Store) -> Slot:
    slot = store.reserve("w")
    assert slot is not None
    return slot


def group_ids(batches: list[pa.RecordBatch] | None) -> list[int]:
    return [decode(batch).slot.group_id for batch in batches or []]


def test_rows_are_on_disk_before_the_ledger_says_complete(
    open_store: Open, group_of: GroupOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def state_at_sync(descriptor: int) -> None:
        db = sqlite3.connect(tmp_path / "ledger.sqlite")
        states.append(db.execute("SELECT state FROM groups").fetchone()[0])
        db.close()

    store, states = open_store(), list[str]()
    slot = reserve(store)
    monkeypatch.setattr(segments.os, "fsync", state_at_sync)
    hand_in(store, group_of(slot))
    assert set(states) == {"issued"}
    assert store.counts()["complete"] == 1
    store.close()


def test_a_disk_that_fails_leaves_the_group_unfinished(
    open_store: Open, group_of: GroupOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError("no space left on device")

    store = open_store()
    slot = reserve(store)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="no space"):
            hand_in(store, group_of(slot))
    assert store.counts() == {
        "issued": 1,
        "in_flight": 1,
        "complete": 0,
        "taken": 0,
        "trained": 0,
        "dropped": 0,
    }
    resumed = open_store()
    resumed.recover(0)
    assert resumed.reserve("w") == Slot(0, 1, slot.task, 0)
    resumed.close()


def test_slots_are_freed_by_dropping_and_by_release_only(open_store: Open, group_of: GroupOf) -> None:
    store = open_store()
    slots = [reserve(store) for _ in range(4)]
    assert store.reserve("w") is None
    hand_in(store, group_of(slots[0]))
    hand_in(store, group_of(slots[1]))
    assert store.reserve("w") is None
    store.drop(slots[2], DropReason.FAILED, "lost")
    assert reserve(store).group_id == 4
    assert group_ids(store.take()) == [0, 1]
    store.landed(1)
    assert store.reserve("w") is None, "landed says nothing about what the engines hold"
    store.release(1)
    assert [reserve(store), reserve(store)] == [
        Slot(5, 0, Task.of("count", 1005), 1),
        Slot(6, 0, Task.of("count", 1006), 1),
    ]
    assert store.reserve("w") is None
    store.close()


def test_after_a_crash_groups_go_on_or_are_issued_again_in_order(open_store: Open, group_of: GroupOf) -> None:
    store = open_store(groups_per_step=2, max_lag=1)
    slots = [reserve(store) for _ in range(4)]
    for slot in slots[:3]:
        hand_in(store, group_of(slot))
    assert group_ids(store.take()) == [0, 1]
    store.landed(1)  # the checkpoint of version 1 holds groups 0 and 1
    store.release(1)
    four, five = reserve(store), reserve(store)
    hand_in(store, group_of(four, versions=1))
    hand_in(store, group_of(slots[3], versions=1))
    assert group_ids(store.take()) == [2, 3]
    store.release(2)
    hand_in(store, group_of(five, versions=2))  # went on while version 2 arrived
    six = reserve(store)
    # Crash. The learner is back at version 1: nothing that version 2 touched exists any more.
    resumed = open_store(groups_per_step=2, max_lag=1)
    with pytest.raises(
        ValueError, match=r"holds 5 unfinished groups of an earlier process: recover\(\) first"
    ):
        resumed.reserve("w")
    resumed.recover(1)
    assert resumed.counts() == {
        "issued": 7,
        "in_flight": 5,
        "complete": 3,
        "taken": 0,
        "trained": 2,
        "dropped": 0,
    }
    assert resumed.reserve("w") == Slot(5, 1, five.task, 1)
    assert resumed.reserve("w") is None, "three groups go on and one is played"
    assert group_ids(resumed.take()) == [2, 3]
    resumed.release(2)
    assert resumed.reserve("w") == Slot(6, 1, six.task, 2)
    assert reserve(resumed).group_id == 7
    with pytest.raises(ValueError, match="before anything is reserved"):
        resumed.recover(2)
    resumed.close()
    store.close()


def test_a_second_crash_still_knows_which_weights_sampled_what(open_store: Open, group_of: GroupOf) -> None:
    store = open_store(groups_per_step=1, max_lag=2)
    slots = [reserve(store) for _ in range(3)]
    hand_in(store, group_of(slots[0]))
    assert group_ids(store.take()) == [0]
    store.release(1)
    hand_in(store, group_of(slots[1], versions=1))
    # The checkpoint of version 1 is there first, then turns out unreadable: back to version 0.
    first = open_store(groups_per_step=1, max_lag=2)
    first.recover(1)
    assert (first.ready, first.counts()["complete"]) == (1, 1)
    second = open_store(groups_per_step=1, max_lag=2)
    second.recover(0)
    assert (second.ready, second.counts()["complete"]) == (0, 0)
    assert [(slot.group_id, slot.attempt) for slot in (reserve(second), reserve(second))] == [(1, 1), (2, 1)]
    for opened in (store, first, second):
        opened.close()


def test_a_run_resumed_with_smaller_settings_does_not_stall(open_store: Open, group_of: GroupOf) -> None:
    store = open_store(groups_per_step=4, max_lag=1)
    for _ in range(8):
        hand_in(store, group_of(reserve(store)))
    store.close()
    resumed = open_store(groups_per_step=2, max_lag=1)
    resumed.recover(0)
    taken = []
    for version in range(1, 5):
        while slot := resumed.reserve("w"):
            hand_in(resumed, group_of(slot))
        taken += group_ids(resumed.take())
        resumed.release(version)
    assert sorted(taken) == list(range(8))
    resumed.close()


def test_no_more_is_given_out_than_the_steps_need(open_store: Open, group_of: GroupOf) -> None:
    store = open_store(groups_per_step=2, max_lag=1, total_steps=2)
    slots = [reserve(store) for _ in range(4)]
    assert store.covered
    store.drop(slots[3], DropReason.FAILED)
    assert not store.covered
    slots[3] = reserve(store)
    for slot in slots:
        hand_in(store, group_of(slot))
    for version in (1, 2):
        store.take()
        store.release(version)
        assert store.covered
        assert store.reserve("w") is None
    store.landed(2)
    assert store.counts() == {
        "issued": 5,
        "in_flight": 0,
        "complete": 0,
        "taken": 0,
        "trained": 4,
        "dropped": 1,
    }
    store.close()


def test_too_many_failures_stop_the_run_and_say_why(open_store: Open, group_of: GroupOf) -> None:
    store = open_store(groups_per_step=1, max_lag=0, max_failed_share=0.1)
    good, failed = EndReason.TERMINATED, EndReason.FAILED
    for _ in range(10):  # 20 of 200 episodes: still allowed
        slot = reserve(store)
        lost = [EpisodeRow(i, failed, 0.0, None, 0, 0, -1, "Traceback\nOSError: disk") for i in range(2)]
        store.drop(slot, DropReason.FAILED, "", lost)
    assert store.take() is None
    hand_in(store, group_of(reserve(store), end_reasons=(good, failed)))
    with pytest.raises(
        TooManyFailures, match=r"^21 of the last 22 episodes .* more than 10% .*: OSError: disk$"
    ):
        store.take()
    store.close()


def test_failures_of_long_ago_are_forgiven(open_store: Open, group_of: GroupOf) -> None:
    store = open_store(groups_per_step=1, max_lag=0, max_failed_share=0.1)
    good, failed = (EndReason.TERMINATED,), (EndReason.FAILED,)
    for version, end_reasons in enumerate([failed * 20, *[good * 20] * 9, failed * 20], start=1):
        hand_in(store, group_of(reserve(store), end_reasons=end_reasons))
        assert store.take() is not None
        store.release(version)
    store.close()


def test_evaluations_are_kept_apart(open_store: Open, group_of: GroupOf, tmp_path: Path) -> None:
    store = open_store()
    trained, held_out = group_of(reserve(store)), group_of(Slot(77, 0, Task.of("count", 77), 0))
    hand_in(store, trained)
    store.archive("before", [encode(held_out)])
    store.close()
    assert read_rows(tmp_path / "groups").column("group_id").to_pylist() == [0, 0]
    assert read_rows(tmp_path / "evaluations" / "before").column("group_id").to_pylist() == [77, 77]
