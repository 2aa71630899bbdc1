"""The replay buffer: who waits is woken, who is late is named, and groups that arrive together share one fsync."""

from __future__ import annotations

import asyncio
import errno
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from rollout.buffer.replay_buffer import ReplayBuffer
from rollout.buffer.replay_store import (
    BufferSettings,
    EpisodeRow,
    FinishedGroup,
    ReplayStore,
    TooManyFailures,
)
from rollout.wire.schema import decode, encode, encode_turns
from rollout.wire.trajectory import DropReason, EndReason, Group, Slot, StaleSlot, Task, Turn

GroupOf = Callable[..., Group]
TasksOf = Callable[[int], Task]


MIB = 2**20


class CountingStore(ReplayStore):
    """Counts syncs, and lets a test hold one up or make it fail. `free`: MiB that the disk has left."""

    syncs = 0
    gate: threading.Event | None = None
    error: OSError | None = None
    free = 1000

    def commit(
        self, turns: Sequence[pa.RecordBatch], finished: Sequence[FinishedGroup]
    ) -> list[StaleSlot | None]:
        if self.gate is not None:
            assert self.gate.wait(10)
        self.syncs += 1
        if self.error is not None:
            raise self.error
        return super().commit(turns, finished)


@pytest.fixture
def store(tmp_path: Path, tasks: TasksOf) -> CountingStore:
    settings = BufferSettings(groups_per_step=2, max_lag=1, min_free_mib=500)
    store = CountingStore(tmp_path, tasks, settings, probe=lambda folder: store.free * MIB)
    return store


async def settled() -> None:
    """Let every task that can go on do so until it waits: the store's thread included, as far as no gate is shut."""
    for _ in range(20):
        await asyncio.sleep(0.002)


loops = count()


async def reserve(replay_buffer: ReplayBuffer, worker: str = "w") -> Slot:
    given = await replay_buffer.reserve(worker, next(loops))
    assert given is not None
    return given.slot


def first_turn(slot: Slot) -> pa.RecordBatch:
    ids = np.array([slot.group_id], dtype=np.int32)
    step = Turn(0, 0, "?", "!", ids, ids, np.float32([-1]), np.int32([slot.version]), 0.0, "stop")
    return encode_turns([(slot, 0, step, None, None)], "w")


def adding(replay_buffer: ReplayBuffer, group: Group) -> asyncio.Task[None]:
    rows = [EpisodeRow.of(trajectory) for trajectory in group.trajectories]
    return asyncio.create_task(replay_buffer.add(group.slot, encode(group), rows))


def test_the_ring_turns_and_everyone_who_waits_is_woken(store: CountingStore, group_of: GroupOf) -> None:
    async def worker(replay_buffer: ReplayBuffer, name: str) -> int:
        played = 0
        while given := await replay_buffer.reserve(name, 0):
            await replay_buffer.record_turns(first_turn(given.slot))
            await adding(replay_buffer, group_of(given.slot))
            played += 1
        return played

    async def run() -> None:
        replay_buffer = ReplayBuffer(store)
        workers = [asyncio.create_task(worker(replay_buffer, f"w{index}")) for index in range(3)]
        for version in range(1, 6):
            groups = [decode(batch) for batch in await replay_buffer.take(version - 1, timeout_s=10)]
            assert all(version - 1 - group.slot.version <= 1 for group in groups)
            await replay_buffer.release(version)
            await replay_buffer.checkpointed(version)
        await settled()
        counts = await replay_buffer.counts()
        await replay_buffer.close()
        assert sum(await asyncio.gather(*workers)) >= 10
        assert counts["trained"] == 10
        assert counts["issued"] == counts["trained"] + counts["in_flight"]

    asyncio.run(run())


def test_a_dropped_group_wakes_who_waits_for_a_slot(store: CountingStore) -> None:
    async def run() -> None:
        replay_buffer = ReplayBuffer(store)
        slots = [await reserve(replay_buffer) for _ in range(4)]
        waiting = asyncio.create_task(reserve(replay_buffer))
        await settled()
        assert not waiting.done()
        await replay_buffer.drop(slots[1], DropReason.FAILED, "lost")
        assert (await waiting).group_id == 4
        await replay_buffer.close()

    asyncio.run(run())


@pytest.mark.parametrize("max_lag", [0, 2])
def test_workers_wait_until_the_last_step_is_made_for_it_may_need_other_groups(
    tmp_path: Path, tasks: TasksOf, group_of: GroupOf, max_lag: int
) -> None:
    settings = BufferSettings(groups_per_step=2, max_lag=max_lag)

    async def scene() -> None:
        replay_buffer = ReplayBuffer(ReplayStore(tmp_path, tasks, settings, total_steps=1))
        played = [await reserve(replay_buffer) for _ in range(2)]
        loops = [asyncio.create_task(replay_buffer.reserve("w", -worker_loop)) for worker_loop in (1, 2)]
        for slot in played:
            await adding(replay_buffer, group_of(slot))
        assert len(await replay_buffer.take(0, 5.0)) == 2
        await settled()
        assert not any(worker_loop.done() for worker_loop in loops)
        await replay_buffer.discard(0, DropReason.NONFINITE)
        others = [given.slot for given in await asyncio.gather(*loops) if given is not None]
        assert [slot.group_id for slot in others] == [2, 3]
        # One of them says nothing: a third takes its place, in the last step too.
        waiting = asyncio.create_task(replay_buffer.reserve("w", -3))
        await settled()
        await replay_buffer.drop(others[0], DropReason.EQUAL_REWARDS)
        third = await waiting
        assert third is not None and third.slot.group_id == 4
        for slot in (others[1], third.slot):
            await adding(replay_buffer, group_of(slot))
        assert len(await replay_buffer.take(0, 5.0)) == 2
        ending = asyncio.create_task(replay_buffer.reserve("w", -4))
        await replay_buffer.release(1)
        assert await ending is None
        assert (await replay_buffer.counts())["dropped"] == 3
        await replay_buffer.close()

    asyncio.run(scene())


def test_turns_and_groups_that_arrive_together_share_one_sync(
    store: CountingStore, group_of: GroupOf
) -> None:
    async def run() -> None:
        replay_buffer = ReplayBuffer(store)
        slots = [await reserve(replay_buffer) for _ in range(4)]
        store.gate = threading.Event()
        first = [adding(replay_buffer, group_of(slot)) for slot in slots[:2]]
        await settled()
        # These come while the first two are being synced.
        second = [
            adding(replay_buffer, group_of(slots[2])),
            asyncio.create_task(replay_buffer.record_turns(first_turn(slots[3]))),
            adding(replay_buffer, group_of(replace(slots[3], attempt=7))),
        ]
        await settled()
        assert not any(task.done() for task in (*first, *second))
        assert store.counts()["complete"] == 0
        store.gate.set()
        await asyncio.gather(*first, *second[:2])
        with pytest.raises(StaleSlot, match="group 3, attempt 7"):
            await second[2]
        assert (await replay_buffer.counts())["complete"] == 3
        assert store.syncs == 2
        await replay_buffer.reassign("w")
        taken_over = await replay_buffer.reserve("other", 0)
        assert taken_over is not None and taken_over.turns is not None and taken_over.turns.num_rows == 1
        await replay_buffer.close()

    asyncio.run(run())


def test_a_cancelled_worker_takes_no_one_along(store: CountingStore, group_of: GroupOf) -> None:
    async def run() -> None:
        replay_buffer = ReplayBuffer(store)
        slots = [await reserve(replay_buffer) for _ in range(2)]
        store.gate = threading.Event()
        adds = [adding(replay_buffer, group_of(slot)) for slot in slots]
        await settled()
        adds[0].cancel()
        await settled()
        assert adds[0].cancelled()
        store.gate.set()
        await adds[1]
        assert (await replay_buffer.counts())["complete"] == 2
        await replay_buffer.close()

    asyncio.run(run())


def test_a_failing_disk_is_told_to_whoever_hands_in(store: CountingStore, group_of: GroupOf) -> None:
    async def run() -> None:
        replay_buffer = ReplayBuffer(store)
        slots = [await reserve(replay_buffer) for _ in range(2)]
        store.error = OSError(errno.EIO, "input/output error")
        outcomes = await asyncio.gather(
            *(adding(replay_buffer, group_of(slot)) for slot in slots), return_exceptions=True
        )
        assert [str(outcome) for outcome in outcomes] == ["[Errno 5] input/output error"] * 2
        assert (await replay_buffer.counts())["complete"] == 0
        store.error = None
        await replay_buffer.close()

    asyncio.run(run())


def test_a_late_batch_is_explained(store: CountingStore, group_of: GroupOf) -> None:
    async def run() -> None:
        now = 100.0
        replay_buffer = ReplayBuffer(store, clock=lambda: now)
        slots = []
        for index in range(3):
            slots.append(await reserve(replay_buffer, f"rollout-{index}"))
            now += 10
        await adding(replay_buffer, group_of(slots[1]))
        missing = (
            "1 groups are complete and a step needs 2; 2 are in flight; "
            "rollout-0 holds group 0 for 30 s; rollout-2 holds group 2 for 10 s"
        )
        with pytest.raises(TimeoutError) as raised:
            await replay_buffer.take(0, timeout_s=0.01)
        assert str(raised.value) == f"no batch within 0.01 s: {missing}"
        facts = {"version": 0, "ready": 1, "held": 2, "waiting": 0, "paused": None, "missing": missing}
        assert await replay_buffer.state() == facts
        await adding(replay_buffer, group_of(slots[0]))
        assert len(await replay_buffer.take(0, timeout_s=10)) == 2
        with pytest.raises(TimeoutError, match="2 are held by a step that was not released"):
            await replay_buffer.take(1, timeout_s=0.01)
        assert await replay_buffer.reassign("rollout-2") == 1
        assert "0 are in flight; 1 wait for a worker" in (await replay_buffer.state())["missing"]
        for _ in range(2):  # the one that waits, and a new one
            await replay_buffer.drop(await reserve(replay_buffer, "rollout-3"), DropReason.EQUAL_REWARDS)
        with pytest.raises(TimeoutError, match=r"; 2 groups were dropped as uniform$"):
            await replay_buffer.take(1, timeout_s=0.01)
        await replay_buffer.release(1)
        assert "uniform" not in (await replay_buffer.state())["missing"], "since the last step"
        await replay_buffer.close()

    asyncio.run(run())


def test_failures_end_the_learners_wait_at_once(store: CountingStore) -> None:
    async def run() -> None:
        replay_buffer = ReplayBuffer(store)
        taking = asyncio.create_task(replay_buffer.take(0, timeout_s=60))
        lost = [EpisodeRow(i, EndReason.FAILED, 0.0, None, 0, 0, -1, "OSError: disk") for i in range(41)]
        await settled()
        await replay_buffer.drop(await reserve(replay_buffer), DropReason.FAILED, "", lost)
        with pytest.raises(TooManyFailures, match="OSError: disk"):
            await taking
        await replay_buffer.close()

    asyncio.run(run())


def test_closing_ends_every_wait_and_keeps_what_was_handed_in(
    store: CountingStore, group_of: GroupOf, tmp_path: Path, tasks: TasksOf
) -> None:
    async def run() -> None:
        replay_buffer = ReplayBuffer(store)
        slots = [await reserve(replay_buffer) for _ in range(4)]
        reserving = asyncio.create_task(replay_buffer.reserve("w", next(loops)))
        taking = asyncio.create_task(replay_buffer.take(0, timeout_s=60))
        store.gate = threading.Event()
        handed_in = adding(replay_buffer, group_of(slots[0]))
        await settled()
        late = adding(replay_buffer, group_of(slots[1]))
        await settled()
        closing = asyncio.create_task(replay_buffer.close())
        await settled()
        assert not closing.done()
        store.gate.set()
        await closing
        await handed_in
        assert await reserving is None
        await late
        assert await replay_buffer.reserve("w", 0) is None
        for refused in (taking, adding(replay_buffer, group_of(slots[2]))):
            with pytest.raises(RuntimeError, match="the replay buffer is closed"):
                await refused

    asyncio.run(run())
    resumed = ReplayStore(tmp_path, tasks, store.settings)
    assert resumed.counts()["complete"] == 2
    assert [resumed.ready, resumed.reserve("v", 0)] == [2, None], "two groups are still held"
    resumed.close()


def test_a_call_that_nobody_waits_for_is_given_no_group(store: CountingStore) -> None:
    async def run() -> None:
        replay_buffer = ReplayBuffer(store)
        slots = [await reserve(replay_buffer, "live") for _ in range(4)]
        gone = asyncio.create_task(replay_buffer.reserve("gone", 0))
        older = asyncio.create_task(replay_buffer.reserve("live", 90))
        await settled()
        newer = asyncio.create_task(replay_buffer.reserve("live", 90))
        await settled()
        assert await replay_buffer.reassign("gone") == 0
        await replay_buffer.drop(slots[0], DropReason.FAILED)
        given = await newer
        assert given is not None and given.slot.group_id == 4
        assert [await gone, await older] == [None, None]
        await replay_buffer.close()

    asyncio.run(run())


def test_a_run_that_goes_back_begins_where_the_checkpoint_stands(
    store: CountingStore, group_of: GroupOf
) -> None:
    async def run() -> None:
        replay_buffer = ReplayBuffer(store)
        for _ in range(4):
            await adding(replay_buffer, group_of(await reserve(replay_buffer)))
        first = [decode(batch).slot for batch in await replay_buffer.take(0, timeout_s=10)]
        await replay_buffer.release(1)
        waiting = asyncio.create_task(reserve(replay_buffer))
        second = await waiting
        assert second.version == 1
        await replay_buffer.rollback(0)
        assert [decode(batch).slot for batch in await replay_buffer.take(0, timeout_s=10)] == first
        await replay_buffer.release(1)
        assert await reserve(replay_buffer) == replace(second, attempt=1)
        await replay_buffer.close()

    asyncio.run(run())


@pytest.mark.parametrize("lack", ["little", "full", "ledger"])
def test_a_run_without_room_on_its_disk_waits_and_goes_on(
    lack: str, store: CountingStore, group_of: GroupOf
) -> None:
    async def run() -> None:
        replay_buffer = ReplayBuffer(store, retry_interval_seconds=0.01)
        slots = [await reserve(replay_buffer) for _ in range(2)]
        if lack == "little":
            store.free = 499
        elif lack == "full":
            store.error = OSError(errno.ENOSPC, "no space left on device")
        else:
            (pages,) = store._ledger._db.execute("PRAGMA page_count").fetchone()
            store._ledger._db.execute(f"PRAGMA max_page_count={pages}")
        long = "x" * 4096 * 20
        rows = [EpisodeRow(0, EndReason.FAILED, 0.0, None, 0, 0, -1, long if lack == "ledger" else "")]
        adds = [asyncio.create_task(replay_buffer.add(slot, encode(group_of(slot)), rows)) for slot in slots]
        async with asyncio.timeout(60):
            while (said := (await replay_buffer.state())["paused"]) is None:
                await settled()
        assert "MiB free, 500 required (buffer.min_free_mib)" in said
        taking = asyncio.create_task(replay_buffer.take(0, timeout_s=0.02))
        await settled()
        await settled()
        assert not taking.done(), "its time stands still"
        other = asyncio.create_task(reserve(replay_buffer))
        await settled()
        assert not other.done()
        store.free, store.error = 1000, None
        store._ledger._db.execute("PRAGMA max_page_count=1000000")
        await asyncio.gather(*adds)
        assert len(await taking) == 2
        await other
        assert (await replay_buffer.state())["paused"] is None
        await replay_buffer.close()

    asyncio.run(run())
