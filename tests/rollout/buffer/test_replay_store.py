"""The store's promises, one by one, where an example says more than the machine of test_store_machine.py."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from rollout.buffer.replay_store import EpisodeRow, ReplayStore, TooManyFailures
from rollout.buffer.segments import read_rows
from rollout.wire.schema import encode
from rollout.wire.trajectory import Assignment, DropReason, EndReason, Group, Slot, Task
from tests.rollout.buffer.stores import assignment, commit, group_ids, reserve, turns

GroupOf = Callable[..., Group]
Open = Callable[..., ReplayStore]


def test_rows_are_on_disk_before_the_ledger_says_complete(
    open_store: Open, group_of: GroupOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def state_at_sync(descriptor: int) -> None:
        db = sqlite3.connect(tmp_path / "ledger.sqlite")
        states.append(db.execute("SELECT state FROM groups").fetchone()[0])
        db.close()

    store, states = open_store(), list[str]()
    slot = reserve(store)
    monkeypatch.setattr(os, "fsync", state_at_sync)
    commit(store, group_of(slot))
    assert set(states) == {"issued"}
    assert store.counts()["complete"] == 1
    store.close()


def test_slots_are_freed_by_dropping_and_by_release_only(open_store: Open, group_of: GroupOf) -> None:
    store = open_store()
    slots = [reserve(store) for _ in range(4)]
    assert store.reserve("other", 0) is None
    commit(store, group_of(slots[0]))
    commit(store, group_of(slots[1]))
    assert store.reserve("other", 0) is None
    store.drop(slots[2], DropReason.FAILED, "lost")
    assert reserve(store).group_id == 4
    assert group_ids(store.take(0)) == [0, 1]
    store.checkpointed(1)
    assert store.reserve("other", 0) is None, "landed says nothing about what the engines hold"
    store.release(1)
    assert [reserve(store), reserve(store)] == [
        Slot(5, 0, Task.of("count", 1005), 1),
        Slot(6, 0, Task.of("count", 1006), 1),
    ]
    assert store.reserve("other", 0) is None
    store.close()


def test_no_more_is_given_out_than_the_steps_need(open_store: Open, group_of: GroupOf) -> None:
    store = open_store(groups_per_step=2, max_lag=1, total_steps=2)
    slots = [reserve(store) for _ in range(4)]
    assert store.reserve("other", 0) is None
    store.drop(slots[3], DropReason.FAILED)
    slots[3] = reserve(store)
    for slot in slots:
        commit(store, group_of(slot))
    for version in (1, 2):
        assert not store.covered
        assert len(store.take(version - 1) or []) == 2
        store.release(version)
        assert store.reserve("other", 0) is None
    assert store.covered
    store.checkpointed(2)
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
    assert store.take(0) is None
    commit(store, group_of(reserve(store), end_reasons=(good, failed)))
    with pytest.raises(
        TooManyFailures, match=r"^21 of the last 22 episodes .* more than 10% .*: OSError: disk$"
    ):
        store.take(0)
    store.close()


def test_failures_of_long_ago_are_forgiven(open_store: Open, group_of: GroupOf) -> None:
    store = open_store(groups_per_step=1, max_lag=0, max_failed_share=0.1)
    good, failed = (EndReason.TERMINATED,), (EndReason.FAILED,)
    for version, end_reasons in enumerate([failed * 20, *[good * 20] * 9, failed * 20], start=1):
        commit(store, group_of(reserve(store), end_reasons=end_reasons))
        assert store.take(version - 1) is not None
        store.release(version)
    store.close()


def test_evaluations_are_kept_apart(open_store: Open, group_of: GroupOf, tmp_path: Path) -> None:
    store = open_store()
    trained, held_out = group_of(reserve(store)), group_of(Slot(77, 0, Task.of("count", 77), 0))
    commit(store, trained)
    store.archive("before", [encode(held_out)])
    store.archive("before", [encode(held_out)])  # the answer was lost
    store.close()
    assert read_rows(tmp_path / "groups").column("group_id").to_pylist() == [0, 0]
    assert read_rows(tmp_path / "evaluations" / "before").column("group_id").to_pylist() == [77, 77]


def test_after_a_crash_groups_go_on_or_are_issued_again_in_order(open_store: Open, group_of: GroupOf) -> None:
    store = open_store(groups_per_step=2, max_lag=1)
    slots = [reserve(store) for _ in range(4)]
    for slot in slots[:3]:
        commit(store, group_of(slot))
    assert group_ids(store.take(0)) == [0, 1]
    store.checkpointed(1)  # the checkpoint of version 1 holds groups 0 and 1
    store.release(1)
    four, five = reserve(store), reserve(store)
    store.commit([turns(four, turn, version=version) for turn, version in enumerate([1, 1, 2])], [])
    commit(store, group_of(slots[3], versions=1))
    assert group_ids(store.take(1)) == [2, 3]
    store.release(2)
    commit(store, group_of(five, versions=2))  # went on while version 2 arrived
    six, seven = reserve(store), reserve(store)
    # The learner is back at version 1: nothing that version 2 touched exists any more.
    for _ in range(2):  # the answer was lost
        store = open_store(groups_per_step=2, max_lag=1)
        store.rollback(1)
        assert store.counts() == {
            "issued": 8,
            "in_flight": 6,
            "complete": 2,
            "taken": 0,
            "trained": 2,
            "dropped": 0,
        }
    # Group 4 kept its slot and the turns of version 1. Group 5 is issued anew as soon as a slot is free.
    taken_over = assignment(store)
    assert taken_over.slot == Slot(4, 1, four.task, 1)
    assert taken_over.turns is not None and taken_over.turns.num_rows == 2
    assert assignment(store) == Assignment(Slot(5, 1, five.task, 1), None)
    assert store.reserve("other", 0) is None
    assert group_ids(store.take(1)) == [2, 3]
    store.release(2)
    assert [reserve(store), reserve(store)] == [Slot(6, 1, six.task, 2), Slot(7, 1, seven.task, 2)]
    store.close()
