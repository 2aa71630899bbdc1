"""The exchange: who waits is woken, who is late is named, and groups that arrive together share one fsync."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from rollout.wire.exchange import Exchange
from rollout.wire.schema import decode, encode
from rollout.wire.store import BufferSettings, EpisodeRow, Store, TooManyFailures
from rollout.wire.trajectory import DropReason, EndReason, Group, Slot, Task

GroupOf = Callable[..., Group]
TasksOf = Callable[[int], Task]


class CountingStore(Store):
    """Counts fsyncs, and lets a test hold one up or make it fail."""

    syncs = 0
    gate: threading.Event | None = None
    broken = False

    def sync(self) -> None:
        if self.gate is not None:
            assert self.gate.wait(10)
        self.syncs += 1
        if self.broken:
            raise OSError("no space left on device")
        super().sync()


@pytest.fixture
def store(tmp_path: Path, tasks: TasksOf) -> CountingStore:
    return CountingStore(tmp_path, tasks, BufferSettings(groups_per_step=2, max_lag=1))


async def settled() -> None:
    """Let every task that can go on do so until it waits."""
    for _ in range(20):
        await asyncio.sleep(0)


async def reserve(exchange: Exchange, worker: str = "w") -> Slot:
    slot = await exchange.reserve(worker)
    assert slot is not None
    return slot


def adding(exchange: Exchange, group: Group) -> asyncio.Task[None]:
    rows = [EpisodeRow.of(trajectory) for trajectory in group.trajectories]
    return asyncio.create_task(exchange.add(group.slot, encode(group), rows))


def test_the_ring_turns_and_everyone_who_waits_is_woken(store: CountingStore, group_of: GroupOf) -> None:
    async def worker(exchange: Exchange, name: str) -> int:
        played = 0
        while slot := await exchange.reserve(name):
            await adding(exchange, group_of(slot))
            played += 1
        return played

    async def run() -> None:
        exchange = Exchange(store)
        workers = [asyncio.create_task(worker(exchange, f"w{index}")) for index in range(3)]
        for version in range(1, 6):
            groups = [decode(batch) for batch in await exchange.take(timeout_s=10)]
            assert all(version - 1 - group.slot.version <= 1 for group in groups)
            await exchange.release(version)
            await exchange.landed(version)
        await settled()
        counts = await exchange.counts()
        await exchange.close()
        assert sum(await asyncio.gather(*workers)) >= 10
        assert counts["trained"] == 10
        assert counts["issued"] == counts["trained"] + counts["in_flight"]

    asyncio.run(run())


def test_a_dropped_group_wakes_who_waits_for_a_slot(store: CountingStore) -> None:
    async def run() -> None:
        exchange = Exchange(store)
        slots = [await reserve(exchange) for _ in range(4)]
        waiting = asyncio.create_task(exchange.reserve("w"))
        await settled()
        assert not waiting.done()
        await exchange.drop(slots[1], DropReason.FAILED, "lost")
        slot = await waiting
        assert slot is not None
        assert slot.group_id == 4
        await exchange.close()

    asyncio.run(run())


def test_groups_that_arrive_together_share_one_fsync(store: CountingStore, group_of: GroupOf) -> None:
    async def run() -> None:
        exchange = Exchange(store)
        slots = [await reserve(exchange) for _ in range(4)]
        store.gate = threading.Event()
        first = [adding(exchange, group_of(slot)) for slot in slots[:2]]
        await settled()
        # These come while the first two are being synced.
        second = [adding(exchange, group_of(slot)) for slot in slots[2:]]
        await settled()
        assert not any(task.done() for task in (*first, *second))
        assert (await exchange.counts())["complete"] == 0
        store.gate.set()
        await asyncio.gather(*first)
        assert (await exchange.counts())["complete"] >= 2
        await asyncio.gather(*second)
        assert (await exchange.counts())["complete"] == 4
        assert store.syncs == 2
        await exchange.close()

    asyncio.run(run())


def test_a_cancelled_worker_takes_no_one_along(store: CountingStore, group_of: GroupOf) -> None:
    async def run() -> None:
        exchange = Exchange(store)
        slots = [await reserve(exchange) for _ in range(2)]
        store.gate = threading.Event()
        adds = [adding(exchange, group_of(slot)) for slot in slots]
        await settled()
        adds[0].cancel()
        await settled()
        assert adds[0].cancelled()
        store.gate.set()
        await adds[1]
        assert (await exchange.counts())["complete"] == 2
        await exchange.close()

    asyncio.run(run())


def test_a_failing_disk_is_told_to_whoever_hands_in(store: CountingStore, group_of: GroupOf) -> None:
    async def run() -> None:
        exchange = Exchange(store)
        slots = [await reserve(exchange) for _ in range(2)]
        store.broken = True
        outcomes = await asyncio.gather(
            *(adding(exchange, group_of(slot)) for slot in slots), return_exceptions=True
        )
        assert [str(outcome) for outcome in outcomes] == ["no space left on device"] * 2
        assert (await exchange.counts())["complete"] == 0
        store.broken = False
        await exchange.close()

    asyncio.run(run())


def test_a_late_batch_is_explained(store: CountingStore, group_of: GroupOf) -> None:
    async def run() -> None:
        now = 100.0
        exchange = Exchange(store, clock=lambda: now)
        slots = []
        for index in range(3):
            slots.append(await reserve(exchange, f"rollout-{index}"))
            now += 10
        await adding(exchange, group_of(slots[1]))
        with pytest.raises(TimeoutError) as raised:
            await exchange.take(timeout_s=0.01)
        assert str(raised.value) == (
            "no batch within 0.01 s: 1 groups are complete and a step needs 2; 2 are in flight; "
            "rollout-0 holds group 0 for 30 s; rollout-2 holds group 2 for 10 s"
        )
        await adding(exchange, group_of(slots[0]))
        assert len(await exchange.take(timeout_s=10)) == 2
        with pytest.raises(TimeoutError, match="2 are held by a step that was not released"):
            await exchange.take(timeout_s=0.01)
        await exchange.close()

    asyncio.run(run())


def test_failures_end_the_learners_wait_at_once(store: CountingStore) -> None:
    async def run() -> None:
        exchange = Exchange(store)
        taking = asyncio.create_task(exchange.take(timeout_s=60))
        lost = [EpisodeRow(i, EndReason.FAILED, 0.0, None, 0, 0, -1, "OSError: disk") for i in range(41)]
        await settled()
        await exchange.drop(await reserve(exchange), DropReason.FAILED, "", lost)
        with pytest.raises(TooManyFailures, match="OSError: disk"):
            await taking
        await exchange.close()

    asyncio.run(run())


def test_closing_ends_every_wait_and_keeps_what_was_handed_in(
    store: CountingStore, group_of: GroupOf, tmp_path: Path, tasks: TasksOf
) -> None:
    async def run() -> None:
        exchange = Exchange(store)
        slots = [await reserve(exchange) for _ in range(4)]
        reserving = asyncio.create_task(exchange.reserve("w"))
        taking = asyncio.create_task(exchange.take(timeout_s=60))
        store.gate = threading.Event()
        handed_in = adding(exchange, group_of(slots[0]))
        await settled()
        late = adding(exchange, group_of(slots[1]))
        await settled()
        closing = asyncio.create_task(exchange.close())
        await settled()
        assert not closing.done()
        store.gate.set()
        await closing
        await handed_in
        assert await reserving is None
        assert await exchange.reserve("w") is None
        for refused in (taking, late, adding(exchange, group_of(slots[2]))):
            with pytest.raises(RuntimeError, match="the exchange is closed"):
                await refused

    asyncio.run(run())
    resumed = Store(tmp_path, tasks, store.settings)
    assert resumed.counts()["complete"] == 1
    resumed.recover(0)
    assert [resumed.ready, resumed.reserve("w")] == [1, Slot(1, 1, tasks(1), 0)]
    resumed.close()
