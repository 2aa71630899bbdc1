"""The store's promises, one by one, where an example says more than the machine of test_store_machine.py."""

from __future__ import annotations

import errno
import os
import sqlite3
from collections.abc import Callable
from itertools import count
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from rollout.wire import appending
from rollout.wire.journal import Journal
from rollout.wire.room import NoRoom, free_bytes
from rollout.wire.schema import decode, encode, encode_turns, restore_turns
from rollout.wire.segments import read_rows, segment_files
from rollout.wire.store import BufferSettings, EpisodeRow, Store, TooManyFailures
from rollout.wire.trajectory import (
    Assignment,
    DropReason,
    EndReason,
    Group,
    Slot,
    StaleSlot,
    Step,
    Task,
)

GroupOf = Callable[..., Group]
TasksOf = Callable[[int], Task]
Open = Callable[..., Store]


@pytest.fixture
def open_store(tmp_path: Path, tasks: TasksOf) -> Open:
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


def rows_of(group: Group) -> list[EpisodeRow]:
    return [EpisodeRow.of(trajectory) for trajectory in group.trajectories]


def hand_in(store: Store, group: Group) -> None:
    assert store.hand_in([], [(group.slot, encode(group), rows_of(group))]) == [None]


lanes = count()


def assignment(store: Store) -> Assignment:
    """What a loop gets that has never asked before."""
    given = store.reserve("w", next(lanes))
    assert given is not None
    return given


def reserve(store: Store) -> Slot:
    return assignment(store).slot


def turns(slot: Slot, turn: int, episode: int = 0, version: int = 0) -> pa.RecordBatch:
    ids = np.array([slot.group_id, slot.attempt, turn], dtype=np.int32)
    step = Step(
        turn, 0, "?", "!", ids, ids, np.zeros(3, np.float32), np.full(3, version, np.int32), 0.0, "stop"
    )
    return encode_turns([(slot, episode, step, None, b"s%d" % turn)], "w")


def files_of(folder: Path) -> dict[str, bytes]:
    """Journal and segments, byte for byte."""
    found = [*(folder / "groups").iterdir(), *(folder / "turns").iterdir()]
    return {path.name: path.read_bytes() for path in found}


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
    monkeypatch.setattr(os, "fsync", state_at_sync)
    hand_in(store, group_of(slot))
    assert set(states) == {"issued"}
    assert store.counts()["complete"] == 1
    store.close()


def test_a_disk_that_fails_has_changed_nothing_and_the_call_may_be_repeated(
    open_store: Open, group_of: GroupOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(descriptor: int) -> None:
        raise OSError(errno.EIO, "input/output error")

    store = open_store()
    first, second = reserve(store), reserve(store)
    hand_in(store, group_of(first))
    before = files_of(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", broken)
        with pytest.raises(OSError, match="input/output"):
            store.hand_in([turns(second, 0)], [(second, encode(group_of(second)), [])])
    assert files_of(tmp_path) == before
    assert store.counts()["in_flight"] == 2 and store.ready == 1
    hand_in(store, group_of(second))
    assert group_ids(store.take(0)) == [0, 1]
    assert read_rows(tmp_path / "groups").column("group_id").to_pylist() == [0, 0, 1, 1]
    store.close()


def test_a_disk_that_takes_only_a_part_of_a_group_keeps_none_of_it(
    open_store: Open, group_of: GroupOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full(appending.FileIO):
        def write(self, part: memoryview) -> int:
            if len(part) < 50:
                raise OSError(errno.ENOSPC, "no space left on device")
            return super().write(part[: len(part) // 2])

    store = open_store()
    hand_in(store, group_of(reserve(store)))
    before = files_of(tmp_path)
    store.close()
    closed = files_of(tmp_path)
    assert {name: data[: len(before[name])] for name, data in closed.items()} == before
    store = open_store()
    slot = reserve(store)
    with monkeypatch.context() as patch:
        patch.setattr(appending, "FileIO", Full)
        with pytest.raises(OSError, match="no space"):
            hand_in(store, group_of(slot))
    assert files_of(tmp_path) == closed
    store.close()


def test_slots_are_freed_by_dropping_and_by_release_only(open_store: Open, group_of: GroupOf) -> None:
    store = open_store()
    slots = [reserve(store) for _ in range(4)]
    assert store.reserve("other", 0) is None
    hand_in(store, group_of(slots[0]))
    hand_in(store, group_of(slots[1]))
    assert store.reserve("other", 0) is None
    store.drop(slots[2], DropReason.FAILED, "lost")
    assert reserve(store).group_id == 4
    assert group_ids(store.take(0)) == [0, 1]
    store.landed(1)
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
        hand_in(store, group_of(slot))
    for version in (1, 2):
        assert not store.covered
        assert len(store.take(version - 1) or []) == 2
        store.release(version)
        assert store.reserve("other", 0) is None
    assert store.covered
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
    assert store.take(0) is None
    hand_in(store, group_of(reserve(store), end_reasons=(good, failed)))
    with pytest.raises(
        TooManyFailures, match=r"^21 of the last 22 episodes .* more than 10% .*: OSError: disk$"
    ):
        store.take(0)
    store.close()


def test_failures_of_long_ago_are_forgiven(open_store: Open, group_of: GroupOf) -> None:
    store = open_store(groups_per_step=1, max_lag=0, max_failed_share=0.1)
    good, failed = (EndReason.TERMINATED,), (EndReason.FAILED,)
    for version, end_reasons in enumerate([failed * 20, *[good * 20] * 9, failed * 20], start=1):
        hand_in(store, group_of(reserve(store), end_reasons=end_reasons))
        assert store.take(version - 1) is not None
        store.release(version)
    store.close()


def test_evaluations_are_kept_apart(open_store: Open, group_of: GroupOf, tmp_path: Path) -> None:
    store = open_store()
    trained, held_out = group_of(reserve(store)), group_of(Slot(77, 0, Task.of("count", 77), 0))
    hand_in(store, trained)
    store.archive("before", [encode(held_out)])
    store.archive("before", [encode(held_out)])  # the answer was lost
    store.close()
    assert read_rows(tmp_path / "groups").column("group_id").to_pylist() == [0, 0]
    assert read_rows(tmp_path / "evaluations" / "before").column("group_id").to_pylist() == [77, 77]


# Going back ---------------------------------------------------------------------------------------------------------


def test_after_a_crash_groups_go_on_or_are_issued_again_in_order(open_store: Open, group_of: GroupOf) -> None:
    store = open_store(groups_per_step=2, max_lag=1)
    slots = [reserve(store) for _ in range(4)]
    for slot in slots[:3]:
        hand_in(store, group_of(slot))
    assert group_ids(store.take(0)) == [0, 1]
    store.landed(1)  # the checkpoint of version 1 holds groups 0 and 1
    store.release(1)
    four, five = reserve(store), reserve(store)
    store.hand_in([turns(four, turn, version=version) for turn, version in enumerate([1, 1, 2])], [])
    hand_in(store, group_of(slots[3], versions=1))
    assert group_ids(store.take(1)) == [2, 3]
    store.release(2)
    hand_in(store, group_of(five, versions=2))  # went on while version 2 arrived
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


def test_turns_of_lost_weights_stay_lost_when_the_process_dies_right_after_going_back(
    open_store: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store()
    slot = reserve(store)
    store.hand_in([turns(slot, turn, version=turn) for turn in range(3)], [])
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "adopt", lambda *_: (_ for _ in ()).throw(SystemExit))
        with pytest.raises(SystemExit):
            store.rollback(1)
    given = assignment(open_store())
    assert given.slot.attempt == 1 and given.turns is not None
    assert given.turns.column("turn").to_pylist() == [0, 1]


def test_a_checkpoint_that_turns_out_unreadable_takes_its_groups_back(
    open_store: Open, group_of: GroupOf
) -> None:
    store = open_store(groups_per_step=1, max_lag=2)
    slots = [reserve(store) for _ in range(3)]
    hand_in(store, group_of(slots[0]))
    assert group_ids(store.take(0)) == [0]
    store.release(1)
    hand_in(store, group_of(slots[1], versions=1))
    store.landed(1)
    store.rollback(1)
    assert (store.ready, store.counts()["trained"]) == (1, 1)
    store.rollback(0)
    assert (store.ready, store.counts()["trained"]) == (1, 0)
    assert group_ids(store.take(0)) == [0]
    store.release(1)
    assert [(slot.group_id, slot.attempt) for slot in (reserve(store), reserve(store))] == [(2, 1), (1, 1)]
    store.close()


def test_a_run_resumed_with_smaller_settings_does_not_stall(open_store: Open, group_of: GroupOf) -> None:
    store = open_store(groups_per_step=4, max_lag=1)
    for _ in range(7):
        hand_in(store, group_of(reserve(store)))
    reserve(store)
    store.close()
    resumed = open_store(groups_per_step=2, max_lag=1)
    resumed.rollback(0)
    taken = []
    for version in range(1, 5):
        while given := resumed.reserve("w", 0):
            hand_in(resumed, group_of(given.slot))
        taken += group_ids(resumed.take(version - 1))
        resumed.release(version)
    assert sorted(taken) == list(range(8))
    resumed.close()


# A worker that is gone, an answer that is lost ----------------------------------------------------------------------


def test_a_group_goes_on_with_another_worker_from_its_durable_turns(
    open_store: Open, group_of: GroupOf, tmp_path: Path
) -> None:
    store = open_store()
    given = store.reserve("gone", 0)
    assert given == Assignment(Slot(0, 0, Task.of("count", 1000), 0), None)
    kept = reserve(store)
    store.hand_in([turns(given.slot, 0), turns(kept, 0), turns(given.slot, 1)], [])
    assert store.hand_on("gone") == 1
    store.hand_in([turns(given.slot, 2)], [])  # nobody holds this attempt any more
    taken_over = assignment(store)
    assert taken_over.slot == Slot(0, 1, given.slot.task, 0)
    assert taken_over.turns is not None
    (so_far,) = restore_turns(taken_over.turns).values()
    assert [step.action_ids.tolist() for step in so_far.steps] == [[0, 0, 0], [0, 0, 1]]
    assert so_far.snapshot == b"s1"
    with pytest.raises(StaleSlot, match="group 0, attempt 0, holds no slot"):
        store.drop(given.slot, DropReason.FAILED)
    (stale,) = store.hand_in([], [(given.slot, encode(group_of(given.slot)), [])])
    assert isinstance(stale, StaleSlot)
    # It plays the third turn, and begins the second episode.
    store.hand_in([turns(taken_over.slot, 2), turns(taken_over.slot, 0, episode=1)], [])
    store.hand_on("w")
    reopened = open_store()
    found = assignment(reopened).turns
    assert found is not None
    episodes = restore_turns(found)
    assert {index: [step.action_ids.tolist()[1] for step in e.steps] for index, e in episodes.items()} == {
        0: [0, 0, 1],
        1: [1],
    }
    store.close()
    reopened.close()


def test_a_loop_that_asks_again_gets_the_same_until_it_has_played(open_store: Open) -> None:
    store = open_store()
    first = store.reserve("w", 3)
    assert first is not None
    assert store.reserve("w", 3) == first
    store = open_store()  # killed
    assert store.reserve("w", 3) == first
    store.hand_in([turns(first.slot, 0)], [])
    # It has recorded a turn, so it had its answer: who asks now is another process under that name.
    again = store.reserve("w", 3)
    assert again is not None and again.turns is not None
    assert again.slot == Slot(0, 1, first.slot.task, 0)
    assert store.hand_in([turns(first.slot, 1)], []) == []
    again = store.reserve("w", 3)
    assert again is not None and again.turns is not None and again.turns.num_rows == 1
    assert store.counts()["issued"] == 1
    store.close()


def test_whatever_is_handed_in_twice_counts_once(open_store: Open, group_of: GroupOf, tmp_path: Path) -> None:
    store = open_store(max_failed_share=1.0)
    slots = [reserve(store) for _ in range(4)]
    group = (slots[0], encode(group_of(slots[0])), rows_of(group_of(slots[0])))
    assert store.hand_in([turns(slots[1], 0)] * 2, [group, group]) == [None, None]
    hand_in(store, group_of(slots[0]))
    store.drop(slots[2], DropReason.FAILED, "lost")
    store.drop(slots[2], DropReason.FAILED, "lost")
    hand_in(store, group_of(slots[1]))
    store = open_store()  # killed
    hand_in(store, group_of(slots[0]))
    store.drop(slots[2], DropReason.FAILED, "lost")
    first = store.take(0)
    assert store.take(0) == first and group_ids(first) == [0, 1]
    store = open_store()
    assert store.take(0) == first, "read back from disk"
    assert store.take(1) is None, "the next step waits for the release"
    for _ in range(2):
        store.release(1)
        store.landed(1)
    store = open_store()
    store.release(1)
    assert store.version == 1
    hand_in(store, group_of(slots[1]))
    assert store.counts() == {
        "issued": 4,
        "in_flight": 1,
        "complete": 0,
        "taken": 0,
        "trained": 2,
        "dropped": 1,
    }
    for wrong in (lambda: store.release(3), lambda: store.take(0), lambda: store.take(2)):
        with pytest.raises(ValueError, match="does not follow"):
            wrong()
    assert read_rows(tmp_path / "groups").num_rows == 4
    store.close()


# What the disk does -------------------------------------------------------------------------------------------------


def test_a_corrupt_segment_costs_the_groups_in_it_that_are_not_trained(
    open_store: Open, group_of: GroupOf, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_store()
    slots = [reserve(store) for _ in range(4)]
    for slot in slots[:3]:
        hand_in(store, group_of(slot))
    assert group_ids(store.take(0)) == [0, 1]
    store.release(1)
    store = open_store()  # killed: rows are read from disk from now on
    hand_in(store, group_of(slots[3]))
    path = tmp_path / "groups" / "segment-000000.arrows"
    data = bytearray(path.read_bytes())
    data[-20] ^= 1  # in the rows of group 2
    path.write_bytes(data)
    assert store.take(1) is None
    assert "segment-000000.arrows: the checksum does not match" in caplog.text
    assert not path.exists() and path.with_name(path.name + ".corrupt").exists()
    again = assignment(store)
    assert again == Assignment(Slot(2, 1, slots[2].task, 1), None)
    hand_in(store, group_of(again.slot))
    assert group_ids(store.take(1)) == [2, 3]
    assert store.counts()["taken"] == 4
    store.close()


def test_a_step_that_cannot_be_read_again_is_put_together_anew(
    open_store: Open, group_of: GroupOf, tmp_path: Path
) -> None:
    store = open_store(max_lag=0)
    slots = [reserve(store) for _ in range(2)]
    hand_in(store, group_of(slots[0]))
    store = open_store(max_lag=0)
    hand_in(store, group_of(slots[1]))
    assert group_ids(store.take(0)) == [0, 1]
    (tmp_path / "groups" / "segment-000000.arrows").unlink()
    assert store.take(0) is None
    again = reserve(store)
    assert again == Slot(0, 1, slots[0].task, 0)
    hand_in(store, group_of(again))
    assert group_ids(store.take(0)) == [0, 1]
    store.close()


def test_the_oldest_trained_segments_go_when_the_share_of_the_disk_is_used(
    open_store: Open, group_of: GroupOf, tmp_path: Path
) -> None:
    small = {"groups_per_step": 1, "max_lag": 1, "segment_mib": 1}
    store = open_store(**small, disk_gib=3 / 1024)
    large = 50_000  # tokens: a group is 1.2 MB, and every one has a segment of its own
    waiting = reserve(store)
    for version in range(1, 5):
        hand_in(store, group_of(reserve(store), tokens=large))
        if version == 2:
            hand_in(store, group_of(waiting, tokens=large))
        assert len(store.take(version - 1) or []) == 1
        store.release(version)
        store.landed(version)
    left = [number for number, _ in segment_files(tmp_path / "groups")]
    assert left == [3, 4]
    store.archive("after", [encode(group_of(waiting))])
    assert read_rows(tmp_path / "evaluations" / "after").num_rows == 2
    store.close()


def test_without_room_nothing_is_given_out_or_taken_in(open_store: Open, group_of: GroupOf) -> None:
    free = 600 * 2**20
    store = open_store(probe=lambda folder: free, min_free_mib=512)
    slot = reserve(store)
    free = 511 * 2**20
    with pytest.raises(NoRoom, match=r"511 MiB free, 512 wanted \(buffer\.min_free_mib\)"):
        reserve(store)
    with pytest.raises(NoRoom):
        hand_in(store, group_of(slot))
    free = 512 * 2**20
    hand_in(store, group_of(slot))
    store.close()
