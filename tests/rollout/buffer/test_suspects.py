"""A group that kills its workers is found and dropped; groups that were only there are not, however many die."""

from __future__ import annotations

from collections.abc import Callable

from rollout.buffer.replay_store import ReplayStore
from rollout.wire.schema import encode
from rollout.wire.trajectory import Assignment, DropReason, Group

Open = Callable[..., ReplayStore]
GroupOf = Callable[..., Group]
LANES = 4


def given_to(store: ReplayStore, worker: str) -> list[Assignment]:
    asked = [store.reserve(worker, worker_loop) for worker_loop in range(LANES)]
    return [assignment for assignment in asked if assignment is not None]


def finish(store: ReplayStore, given: list[Assignment], group_of: GroupOf) -> None:
    store.commit([], [(each.slot, encode(group_of(each.slot)), []) for each in given])


def test_a_group_that_kills_every_worker_is_dropped_alone_and_the_run_goes_on(
    open_store: Open, group_of: GroupOf
) -> None:
    def opened() -> ReplayStore:
        return open_store(groups_per_step=4, max_lag=0, total_steps=1)

    store, lost, seen = opened(), 0, []
    while store.ready < 4:
        worker = f"w{lost}"
        given = given_to(store, worker)
        guilty = [each for each in given if each.slot.group_id == 1]
        if not guilty:
            finish(store, given, group_of)
            continue
        seen.append((guilty[0].losses, len(given)))
        store.reassign(worker, lost="it died")
        assert store.reassign(worker, lost="it died") == 0, "a call that is repeated counts once"
        lost += 1
        store.close()
        store = opened()  # what is known of a group outlives the process
    assert seen == [(0, 4), (1, 4), (2, 1)], (
        "twice among others, which may have been the cause; then by itself"
    )
    assert store.counts()["dropped"] == 1
    reason, error = store._ledger.db.execute("SELECT reason, error FROM groups WHERE group_id = 1").fetchone()
    assert (reason, error) == (DropReason.CRASHED, "it died")
    assert store.counts()["issued"] == 5 and store.ready == 4


def test_a_group_that_is_under_suspicion_waits_for_an_idle_worker_which_gets_nothing_else(
    open_store: Open, group_of: GroupOf
) -> None:
    store = open_store(groups_per_step=4, max_lag=0)
    for worker in ("a", "b"):
        assert store.reserve(worker, 0) is not None
        store.reassign(worker, lost="it died")
    first, second = store.reserve("c", 0), store.reserve("c", 1)
    assert first is not None and first.slot.group_id == 0
    assert second is None, "the first is to be its only group"
    other = store.reserve("d", 0)
    assert other is not None and other.slot.group_id == 1
    finish(store, [first], group_of)
    third = store.reserve("c", 1)
    assert third is not None and third.slot.group_id == 2


def test_workers_that_are_killed_from_outside_or_leave_cost_no_group(
    open_store: Open, group_of: GroupOf
) -> None:
    store = open_store(groups_per_step=4, max_lag=1)
    for life in range(12):
        given = given_to(store, f"w{life}")
        finish(store, given[: len(given) // 2], group_of)
        store.reassign(f"w{life}", lost="it was killed" if life % 2 else "")
        if store.take(store.version):
            store.release(store.version + 1)
    assert store.version > 1
    assert store.counts()["dropped"] == 0
