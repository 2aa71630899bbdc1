"""A learner that goes back, a worker that is gone, an answer that is lost: nothing is lost or counted twice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from rollout.buffer.journal import Journal
from rollout.buffer.replay_store import ReplayStore
from rollout.buffer.segments import read_rows
from rollout.wire.schema import encode, restore_turns
from rollout.wire.trajectory import Assignment, DropReason, Group, Slot, StaleSlot, Task
from tests.rollout.buffer.stores import assignment, commit, group_ids, reserve, rows_of, turns

GroupOf = Callable[..., Group]
Open = Callable[..., ReplayStore]


def test_turns_of_lost_weights_stay_lost_when_the_process_dies_right_after_going_back(
    open_store: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store()
    slot = reserve(store)
    store.commit([turns(slot, turn, version=turn) for turn in range(3)], [])
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
    commit(store, group_of(slots[0]))
    assert group_ids(store.take(0)) == [0]
    store.release(1)
    commit(store, group_of(slots[1], versions=1))
    store.checkpointed(1)
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
        commit(store, group_of(reserve(store)))
    reserve(store)
    store.close()
    resumed = open_store(groups_per_step=2, max_lag=1)
    resumed.rollback(0)
    taken = []
    for version in range(1, 5):
        while given := resumed.reserve("w", 0):
            commit(resumed, group_of(given.slot))
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
    store.commit([turns(given.slot, 0), turns(kept, 0), turns(given.slot, 1)], [])
    assert store.reassign("gone") == 1
    store.commit([turns(given.slot, 2)], [])  # nobody holds this attempt any more
    taken_over = assignment(store)
    assert taken_over.slot == Slot(0, 1, given.slot.task, 0)
    assert taken_over.turns is not None
    (resume_from,) = restore_turns(taken_over.turns).values()
    assert [step.action_ids.tolist() for step in resume_from.turns] == [[0, 0, 0], [0, 0, 1]]
    assert resume_from.snapshot == b"s1"
    with pytest.raises(StaleSlot, match="group 0, attempt 0, holds no slot"):
        store.drop(given.slot, DropReason.FAILED)
    (stale,) = store.commit([], [(given.slot, encode(group_of(given.slot)), [])])
    assert isinstance(stale, StaleSlot)
    # It plays the third turn, and begins the second episode.
    store.commit([turns(taken_over.slot, 2), turns(taken_over.slot, 0, episode=1)], [])
    store.reassign("w")
    reopened = open_store()
    assert reopened.reserve("gone", 0) is None and reopened.reserve("w", 5) is None
    found = reopened.reserve("another", 0)
    assert found is not None and found.turns is not None
    episodes = restore_turns(found.turns)
    assert {index: [step.action_ids.tolist()[1] for step in e.turns] for index, e in episodes.items()} == {
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
    store.commit([turns(first.slot, 0)], [])
    # It has recorded a turn, so it had its answer: who asks now is another process under that name.
    again = store.reserve("w", 3)
    assert again is not None and again.turns is not None
    assert again.slot == Slot(0, 1, first.slot.task, 0)
    assert store.commit([turns(first.slot, 1)], []) == []
    again = store.reserve("w", 3)
    assert again is not None and again.turns is not None and again.turns.num_rows == 1
    assert store.counts()["issued"] == 1
    store.close()


def test_whatever_is_handed_in_twice_counts_once(open_store: Open, group_of: GroupOf, tmp_path: Path) -> None:
    store = open_store(max_failed_share=1.0)
    slots = [reserve(store) for _ in range(4)]
    group = (slots[0], encode(group_of(slots[0])), rows_of(group_of(slots[0])))
    assert store.commit([turns(slots[1], 0)] * 2, [group, group]) == [None, None]
    commit(store, group_of(slots[0]))
    store.drop(slots[2], DropReason.FAILED, "lost")
    store.drop(slots[2], DropReason.FAILED, "lost")
    commit(store, group_of(slots[1]))
    store = open_store()  # killed
    commit(store, group_of(slots[0]))
    store.drop(slots[2], DropReason.FAILED, "lost")
    first = store.take(0)
    assert store.take(0) == first and group_ids(first) == [0, 1]
    store = open_store()
    assert store.take(0) == first, "read back from disk"
    assert store.take(1) is None, "the next step waits for the release"
    for _ in range(2):
        store.release(1)
        store.checkpointed(1)
    store = open_store()
    store.release(1)
    assert store.version == 1
    commit(store, group_of(slots[1]))
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
