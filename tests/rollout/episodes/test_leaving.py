"""A worker may leave at any time: what it has finished is not sampled again, and what ends it is said."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from transformers import PreTrainedTokenizerFast

from rollout.agents.agent import Agent
from rollout.buffer.replay_buffer import ReplayBuffer
from rollout.buffer.replay_store import BufferSettings, ReplayStore
from rollout.engines.engine import EngineDied
from rollout.engines.scripted_engine import ScriptedEngine
from rollout.episodes import recorder
from rollout.episodes.pool import EnvironmentPool
from rollout.episodes.tasks import TaskStream
from rollout.episodes.worker import RolloutSettings, RolloutWorker
from rollout.wire.schema import decode
from rollout.wire.trajectory import Group, Slot, StaleSlot, Task
from tests.rollout.fake_replay_buffer import FakeReplayBuffer

AgentOf = Callable[..., Agent]
SETTINGS = RolloutSettings(group_size=3, concurrent_groups=2, max_turns=10, episode_seconds=30.0)
TURNS = 6  # of every episode
GROUPS = 4


class Gate:
    """Lets so many requests of an engine through, and then none until it is opened."""

    def __init__(self, requests: int) -> None:
        self.left = requests
        self.shut = asyncio.Event()  # somebody waits
        self.open = asyncio.Event()

    async def __call__(self) -> None:
        await asyncio.sleep(0)
        self.left -= 1
        if self.left < 0:
            self.shut.set()
            await self.open.wait()


class Rig:
    def __init__(self, tokenizer: PreTrainedTokenizerFast, agent_of: AgentOf, orders: Any) -> None:
        self.tokenizer, self.agent_of, self.orders = tokenizer, agent_of, orders
        orders.length = TURNS
        self.engines: list[ScriptedEngine] = []

    def worker(
        self, replay_buffer: Any, latency: Callable[[], Awaitable[None]] | None = None, name: str = "w"
    ) -> RolloutWorker:
        engine = ScriptedEngine(self.tokenizer, lambda prompt, rng: rng.choice(["left", "right"]), 0, latency)
        self.engines.append(engine)
        pool = EnvironmentPool(self.orders.make)
        return RolloutWorker(
            name, engine, self.agent_of(engine), replay_buffer, SETTINGS, run_seed=1, pool=pool
        )

    def uninterrupted(self) -> dict[int, Any]:
        replay_buffer = FakeReplayBuffer(slots())
        asyncio.run(self.worker(replay_buffer).run())
        return facts(replay_buffer.groups)

    @property
    def sampled(self) -> int:
        return sum(len(engine.requests) for engine in self.engines)


def slots() -> list[Slot]:
    return [Slot(index, 0, Task.of("count", 100 + index), 0) for index in range(GROUPS)]


def facts(groups: dict[int, Group]) -> dict[int, Any]:
    return {
        group_id: [
            (t.end_reason, [(s.observation, s.action, s.reward) for s in t.turns]) for t in group.trajectories
        ]
        for group_id, group in sorted(groups.items())
    }


def handed_in(replay_buffer: FakeReplayBuffer) -> int:
    """Turns of the groups that are complete."""
    return sum(len(t.turns) for group in replay_buffer.groups.values() for t in group.trajectories)


@pytest.fixture
def rig(tokenizer: PreTrainedTokenizerFast, agent_of: AgentOf, orders: Any) -> Rig:
    return Rig(tokenizer, agent_of, orders)


@pytest.mark.parametrize("requests", [0, 1, 20, 45])
def test_after_a_drain_the_next_worker_goes_on_and_nothing_is_sampled_twice(rig: Rig, requests: int) -> None:
    expected = rig.uninterrupted()
    rig.engines.clear()

    async def leave() -> FakeReplayBuffer:
        replay_buffer, gate = FakeReplayBuffer(slots()), Gate(requests)
        worker = rig.worker(replay_buffer, gate)
        run = asyncio.create_task(worker.run())
        await gate.shut.wait()
        draining = asyncio.create_task(worker.drain())
        await asyncio.sleep(0)
        assert not draining.done(), "turns that are being sampled are waited for"
        gate.open.set()
        await draining
        await run
        assert rig.sampled == len(replay_buffer.turns()) + handed_in(replay_buffer)
        assert rig.sampled == requests + 6, (
            "six episodes were each in a turn, and that turn was their last here"
        )
        assert worker.counters()["turns"] == rig.sampled
        replay_buffer.reassign()
        second = rig.worker(replay_buffer, name="second")
        await second.run()
        counters = second.counters()
        assert counters["turns_reused"] == len(replay_buffer.turns()) > 0
        assert counters["turns"] + counters["turns_reused"] >= len(rig.engines[1].requests)
        return replay_buffer

    replay_buffer = asyncio.run(leave())
    assert facts(replay_buffer.groups) == expected
    assert rig.sampled == GROUPS * 3 * TURNS


def test_a_worker_that_is_lost_costs_no_turn_that_was_recorded(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder, "FLUSH_INTERVAL_SECONDS", 0.01)
    expected = rig.uninterrupted()
    rig.engines.clear()

    async def lose() -> tuple[FakeReplayBuffer, int]:
        replay_buffer, gate = FakeReplayBuffer(slots()), Gate(20)
        run = asyncio.create_task(rig.worker(replay_buffer, gate).run())
        await gate.shut.wait()
        while len(replay_buffer.turns()) < 20:
            await replay_buffer.recorded.wait()
            replay_buffer.recorded.clear()
        run.cancel()
        with pytest.raises(asyncio.CancelledError):
            await run
        recorded = len(replay_buffer.turns())
        replay_buffer.reassign()
        await rig.worker(replay_buffer).run()
        return replay_buffer, recorded

    replay_buffer, recorded = asyncio.run(lose())
    assert recorded == 20
    assert facts(replay_buffer.groups) == expected
    assert rig.sampled == GROUPS * 3 * TURNS


def test_a_group_handed_in_before_the_next_tick_is_not_recorded(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder, "FLUSH_INTERVAL_SECONDS", 3600.0)
    replay_buffer = FakeReplayBuffer(slots())
    asyncio.run(rig.worker(replay_buffer).run())
    assert set(replay_buffer.groups) == {0, 1, 2, 3}
    assert replay_buffer.calls == []


def test_stopped_it_gives_up_running_turns_and_can_run_again(rig: Rig) -> None:
    expected = rig.uninterrupted()

    async def stop() -> FakeReplayBuffer:
        replay_buffer, gate = FakeReplayBuffer(slots(), ends=False), Gate(20)
        worker = rig.worker(replay_buffer, gate)
        run = asyncio.create_task(worker.run())
        await gate.shut.wait()
        await worker.stop()
        await run
        assert len(replay_buffer.turns()) == 20, "what was finished is durable, though turns were cut"
        replay_buffer.reassign()
        gate.open.set()
        run = asyncio.create_task(worker.run())
        while len(replay_buffer.groups) < GROUPS:
            await asyncio.sleep(0)
        await worker.stop()  # while its loops wait for a slot
        await run
        assert worker.counters()["turns_reused"] == 20
        return replay_buffer

    assert facts(asyncio.run(stop()).groups) == expected


def test_a_group_that_another_worker_has_now_is_counted_and_left_to_it(rig: Rig) -> None:
    class Fenced(FakeReplayBuffer):
        async def add(self, slot: Slot, *rest: Any) -> None:
            if slot.group_id == 1:
                del self.held[next(worker_loop for worker_loop, held in self.held.items() if held == slot)]
                raise StaleSlot("group 1 is held by attempt 1")
            await super().add(slot, *rest)

    replay_buffer = Fenced(slots())
    worker = rig.worker(replay_buffer)
    asyncio.run(worker.run())
    assert set(replay_buffer.groups) == {0, 2, 3}
    counters = worker.counters()
    assert (counters["groups"], counters["groups_superseded"], counters["groups_dropped"]) == (3, 1, 0)


def test_an_engine_that_died_ends_the_worker_and_fails_no_episode(rig: Rig) -> None:
    async def die() -> None:
        gate.left -= 1
        if gate.left < 0:
            raise EngineDied("rollout-0: vLLM's engine process 77 is gone")

    gate = Gate(20)
    replay_buffer = FakeReplayBuffer(slots())
    worker = rig.worker(replay_buffer, die)
    with pytest.raises(EngineDied, match="process 77"):
        asyncio.run(worker.run())
    assert replay_buffer.dropped == {}
    assert len(replay_buffer.turns()) + handed_in(replay_buffer) == 20, "its finished turns are durable"
    with pytest.raises(EngineDied):
        asyncio.run(worker.evaluate([Task.of("count", 1)]))
    assert worker.counters()["episodes_failed"] == 0


def test_a_replay_buffer_that_takes_no_turns_ends_the_worker(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder, "FLUSH_INTERVAL_SECONDS", 0.01)

    class Gone(FakeReplayBuffer):
        async def record_turns(self, batch: pa.RecordBatch) -> None:
            raise ConnectionError("the replay buffer is gone")

    async def run() -> None:
        await rig.worker(Gone(slots()), Gate(5)).run()

    with pytest.raises(ConnectionError, match="the replay buffer is gone"):
        asyncio.run(run())


@pytest.mark.parametrize("requests", [3, 25])
def test_with_the_real_replay_buffer_a_lost_workers_groups_are_what_they_would_have_been(
    rig: Rig, tmp_path: Path, requests: int
) -> None:
    def opened(name: str) -> ReplayBuffer:
        buffer = BufferSettings(groups_per_step=2, max_lag=1)
        return ReplayBuffer(ReplayStore(tmp_path / name, TaskStream("count"), buffer, total_steps=2))

    async def taken(replay_buffer: ReplayBuffer) -> dict[int, Any]:
        groups: dict[int, Group] = {}
        for version in (0, 1):
            batches = await replay_buffer.take(version, timeout_s=20.0)
            groups |= {group.slot.group_id: group for group in map(decode, batches)}
            await replay_buffer.release(version + 1)
        return facts(groups)

    async def undisturbed() -> dict[int, Any]:
        replay_buffer = opened("undisturbed")
        _, groups = await asyncio.gather(rig.worker(replay_buffer).run(), taken(replay_buffer))
        await replay_buffer.close()
        return groups

    async def disturbed() -> dict[int, Any]:
        replay_buffer, gate = opened("disturbed"), Gate(requests)
        first, second = rig.worker(replay_buffer, gate, "first"), rig.worker(replay_buffer, name="second")
        leaving = asyncio.create_task(first.run())
        await gate.shut.wait()
        await first.stop()
        await leaving
        assert await replay_buffer.reassign("first") > 0
        _, groups = await asyncio.gather(second.run(), taken(replay_buffer))
        counters = first.counters(), second.counters()
        assert counters[1]["turns_reused"] > 0
        assert sum(each["turns"] for each in counters) == GROUPS * 3 * TURNS, "nothing was sampled twice"
        await replay_buffer.close()
        return groups

    assert asyncio.run(disturbed()) == asyncio.run(undisturbed())
