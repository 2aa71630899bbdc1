"""What the store makes of a disk that fails, is full, or gives back something else than was written."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from rollout.buffer import append_only as appending
from rollout.buffer.disk_space import OutOfDiskSpace
from rollout.buffer.replay_store import ReplayStore
from rollout.buffer.segments import read_rows, segment_files
from rollout.wire.schema import encode
from rollout.wire.trajectory import Assignment, Group, Slot
from tests.rollout.buffer.stores import assignment, commit, files_of, group_ids, reserve, turns

GroupOf = Callable[..., Group]
Open = Callable[..., ReplayStore]


def test_a_disk_that_fails_has_changed_nothing_and_the_call_may_be_repeated(
    open_store: Open, group_of: GroupOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(descriptor: int) -> None:
        raise OSError(errno.EIO, "input/output error")

    store = open_store()
    first, second = reserve(store), reserve(store)
    commit(store, group_of(first))
    before = files_of(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", broken)
        with pytest.raises(OSError, match="input/output"):
            store.commit([turns(second, 0)], [(second, encode(group_of(second)), [])])
    assert files_of(tmp_path) == before
    assert store.counts()["in_flight"] == 2 and store.ready == 1
    commit(store, group_of(second))
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
    commit(store, group_of(reserve(store)))
    before = files_of(tmp_path)
    store.close()
    closed = files_of(tmp_path)
    assert {name: data[: len(before[name])] for name, data in closed.items()} == before
    store = open_store()
    slot = reserve(store)
    with monkeypatch.context() as patch:
        patch.setattr(appending, "FileIO", Full)
        with pytest.raises(OSError, match="no space"):
            commit(store, group_of(slot))
    assert files_of(tmp_path) == closed
    store.close()


def test_a_corrupt_segment_costs_the_groups_in_it_that_are_not_trained(
    open_store: Open, group_of: GroupOf, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_store()
    slots = [reserve(store) for _ in range(4)]
    for slot in slots[:3]:
        commit(store, group_of(slot))
    assert group_ids(store.take(0)) == [0, 1]
    store.release(1)
    store = open_store()  # killed: rows are read from disk from now on
    commit(store, group_of(slots[3]))
    path = tmp_path / "groups" / "segment-000000.arrows"
    data = bytearray(path.read_bytes())
    data[-20] ^= 1  # in the rows of group 2
    path.write_bytes(data)
    assert store.take(1) is None
    assert "segment-000000.arrows: the checksum does not match" in caplog.text
    assert not path.exists() and path.with_name(path.name + ".corrupt").exists()
    again = assignment(store)
    assert again == Assignment(Slot(2, 1, slots[2].task, 1), None)
    commit(store, group_of(again.slot))
    assert group_ids(store.take(1)) == [2, 3]
    assert store.counts()["taken"] == 4
    store.close()


def test_a_step_that_cannot_be_read_again_is_put_together_anew(
    open_store: Open, group_of: GroupOf, tmp_path: Path
) -> None:
    store = open_store(max_lag=0)
    slots = [reserve(store) for _ in range(2)]
    commit(store, group_of(slots[0]))
    store = open_store(max_lag=0)
    commit(store, group_of(slots[1]))
    assert group_ids(store.take(0)) == [0, 1]
    (tmp_path / "groups" / "segment-000000.arrows").unlink()
    assert store.take(0) is None
    again = reserve(store)
    assert again == Slot(0, 1, slots[0].task, 0)
    commit(store, group_of(again))
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
        commit(store, group_of(reserve(store), tokens=large))
        if version == 2:
            commit(store, group_of(waiting, tokens=large))
        assert len(store.take(version - 1) or []) == 1
        store.release(version)
        store.checkpointed(version)
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
    with pytest.raises(OutOfDiskSpace, match=r"511 MiB free, 512 required \(buffer\.min_free_mib\)"):
        reserve(store)
    with pytest.raises(OutOfDiskSpace):
        commit(store, group_of(slot))
    free = 512 * 2**20
    commit(store, group_of(slot))
    store.close()
