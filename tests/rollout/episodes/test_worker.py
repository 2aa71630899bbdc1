"""Groups repeat under any schedule, failures cost what they must, and the ledger balances."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from rollout.agents.agent import Agent
from rollout.buffer.replay_buffer import ReplayBuffer
from rollout.buffer.replay_store import BufferSettings, ReplayStore
from rollout.engines.scripted_engine import ScriptedEngine
from rollout.episodes.evaluation import EvaluationPlan, as_groups
from rollout.episodes.pool import EnvironmentPool
from rollout.episodes.tasks import TaskStream
from rollout.episodes.worker import RolloutSettings, RolloutWorker
from rollout.wire.schema import decode
from rollout.wire.trajectory import Assignment, DropReason, EndReason, Group, Slot, Task, Trajectory
from tests.rollout.fake_replay_buffer import FakeReplayBuffer

AgentOf = Callable[..., Agent]
SETTINGS = RolloutSettings(group_size=3, concurrent_groups=4, max_turns=10, episode_seconds=30.0)


def slots(count: int, attempt: int = 0) -> list[Slot]:
    return [Slot(index, attempt, Task.of("count", 100 + index), 0) for index in range(count)]


def facts(group: Group) -> list[Any]:
    """Everything that must repeat: all but timings."""
    return [
        (
            t.index,
            t.end_reason,
            t.reward,
            [(s.action, s.prompt_ids.tolist(), s.action_ids.tolist()) for s in t.turns],
        )
        for t in group.trajectories
    ]


class Rig:
    def __init__(self, tokenizer: PreTrainedTokenizerFast, agent_of: AgentOf, orders: Any) -> None:
        self.tokenizer, self.agent_of, self.orders = tokenizer, agent_of, orders

    def engine(self, hurry: Random | None = None) -> ScriptedEngine:
        async def yield_a_few_times() -> None:
            for _ in range(hurry.randrange(8) if hurry else 1):
                await asyncio.sleep(0)

        return ScriptedEngine(
            self.tokenizer, lambda prompt, rng: rng.choice(["left", "right"]), 0, yield_a_few_times
        )

    def worker(
        self, replay_buffer: Any, settings: RolloutSettings = SETTINGS, hurry: Random | None = None
    ) -> RolloutWorker:
        engine = self.engine(hurry)
        pool = EnvironmentPool(self.orders.make)
        return RolloutWorker(
            "w", engine, self.agent_of(engine), replay_buffer, settings, run_seed=1, pool=pool
        )

    def groups(
        self, given: Sequence[Slot], concurrent: int, hurry: Random | None = None
    ) -> dict[int, list[Any]]:
        replay_buffer = FakeReplayBuffer(given)
        settings = SETTINGS.model_copy(update={"concurrent_groups": concurrent})
        asyncio.run(self.worker(replay_buffer, settings, hurry).run())
        return {group_id: facts(group) for group_id, group in replay_buffer.groups.items()}


@pytest.fixture
def rig(tokenizer: PreTrainedTokenizerFast, agent_of: AgentOf, orders: Any) -> Rig:
    return Rig(tokenizer, agent_of, orders)


def test_groups_do_not_depend_on_the_schedule_nor_on_the_attempt(rig: Rig) -> None:
    alone = rig.groups(slots(6), concurrent=1)
    assert len(alone) == 6
    for seed in range(3):
        assert rig.groups(slots(6), concurrent=6, hurry=Random(seed)) == alone
    assert rig.groups(slots(6, attempt=1), concurrent=2) == alone


def test_siblings_share_the_instance_and_differ_in_sampling(rig: Rig) -> None:
    rig.orders.length = 8
    (siblings,) = rig.groups(slots(1), concurrent=1).values()
    first_prompts = {tuple(steps[0][1]) for _, _, _, steps in siblings}
    actions = {tuple(step[0] for step in steps) for _, _, _, steps in siblings}
    assert len(first_prompts) == 1
    assert len(actions) == 3


def test_a_group_survives_with_two_siblings_and_is_dropped_with_one(rig: Rig) -> None:
    failing = {100: 1, 101: 2, 102: 3}  # seed -> how many siblings fail
    seen: dict[int, int] = {}

    def reset_error(seed: int) -> Exception | None:
        seen[seed] = seen.get(seed, 0) + 1
        return RuntimeError("lost the map") if seen[seed] <= failing[seed] else None

    rig.orders.reset_error = reset_error
    replay_buffer = FakeReplayBuffer(slots(3))
    worker = rig.worker(replay_buffer)
    asyncio.run(worker.run())
    assert set(replay_buffer.groups) == {0}
    # The failed sibling had no step and so has no row; the two others are what there is to learn from.
    assert len(replay_buffer.groups[0].trainable) == 2
    assert set(replay_buffer.dropped) == {1, 2}
    reason, error, rows = replay_buffer.dropped[1]
    assert reason is DropReason.FAILED
    assert "lost the map" in error
    assert [row.end_reason for row in rows].count(EndReason.FAILED) == 2
    counters = worker.counters()
    assert (counters["groups"], counters["groups_dropped"]) == (1, 2)
    assert counters["episodes"] == 9
    assert counters["episodes_failed"] == 6


def test_a_group_whose_episodes_all_earned_the_same_is_given_up_where_that_is_asked(rig: Rig) -> None:
    paid = iter([0.3, 0.1 + 0.2] * 50)  # the same, but for rounding
    rig.orders.reward = lambda seed, turn: next(paid) if seed == 100 else None
    for asked, kept in ((False, {0, 1, 2}), (True, {1, 2})):
        replay_buffer = FakeReplayBuffer(slots(3))
        worker = rig.worker(replay_buffer, SETTINGS.model_copy(update={"dynamic_sampling": asked}))
        asyncio.run(worker.run())
        uniform = {
            i
            for i, group in replay_buffer.groups.items()
            if np.ptp([t.reward for t in group.trajectories]) < 1e-6
        }
        assert (set(replay_buffer.groups) == kept, bool(uniform)) == (True, not asked)
        assert {reason for reason, _, _ in replay_buffer.dropped.values()} == (
            {DropReason.EQUAL_REWARDS} if asked else set()
        )
        assert worker.counters()["groups_uniform"] == len(replay_buffer.dropped)


def test_a_replica_is_reused_until_its_episode_fails(rig: Rig) -> None:
    rig.orders.step_error = lambda seed, turn: RuntimeError("broken") if seed == 101 else None
    settings = SETTINGS.model_copy(update={"group_size": 1, "concurrent_groups": 1})
    asyncio.run(rig.worker(FakeReplayBuffer(slots(4)), settings).run())
    assert [env.resets for env in rig.orders.made] == [[100, 101], [102, 103]]
    assert [env.closed for env in rig.orders.made] == [True, False]


def test_an_environment_that_cannot_be_made_costs_its_episodes(rig: Rig) -> None:
    def make(env_id: str, **options: Any) -> Any:
        raise ImportError("no module named tiles")

    replay_buffer = FakeReplayBuffer(slots(1))
    worker = rig.worker(replay_buffer)
    worker._pool = EnvironmentPool(make)
    asyncio.run(worker.run())
    assert "no module named tiles" in replay_buffer.dropped[0][1]


def test_a_mistake_of_ours_ends_the_worker_with_that_very_error(rig: Rig) -> None:
    worker = rig.worker(FakeReplayBuffer(slots(6)))

    async def misspelt() -> None:
        raise NameError("modle")

    worker.engine._latency = misspelt  # type: ignore[attr-defined]
    with pytest.raises(NameError, match="modle"):
        asyncio.run(worker.run())


def test_a_group_that_ends_its_worker_by_an_error_ends_no_second_one(rig: Rig) -> None:
    class LostBefore(FakeReplayBuffer):
        async def reserve(self, worker: str, worker_loop: int) -> Assignment | None:
            given = await super().reserve(worker, worker_loop)
            return given and replace(given, losses=1)

    replay_buffer, asked = LostBefore(slots(6)), count()
    worker = rig.worker(replay_buffer)

    async def once() -> None:
        if next(asked) == 5:
            raise NameError("modle")

    worker.engine._latency = once  # type: ignore[attr-defined]
    asyncio.run(worker.run())
    ((reason, error, _),) = replay_buffer.dropped.values()
    assert reason is DropReason.CRASHED
    assert "NameError: modle" in error and "test_worker.py" in error
    assert len(replay_buffer.groups) == 5
    assert worker.counters()["groups_dropped"] == 1


def test_evaluation_keeps_order_repeats_itself_and_bounds_what_runs_at_once(rig: Rig) -> None:
    tasks = [Task.of("count", seed) for seed in (3, 1, 9)]
    settings = SETTINGS.model_copy(update={"group_size": 2, "concurrent_groups": 1})

    def evaluate(hurry: Random | None) -> list[Trajectory]:
        return asyncio.run(
            rig.worker(FakeReplayBuffer([]), settings, hurry).evaluate(tasks, EvaluationPlan(samples=2))
        )

    first, again = evaluate(None), evaluate(Random(0))
    assert [trajectory.task.seed for trajectory in first] == [3, 3, 1, 1, 9, 9]
    assert [trajectory.index for trajectory in first] == [0, 1] * 3
    assert [[s.action for s in t.turns] for t in first] == [[s.action for s in t.turns] for t in again]
    assert len(rig.orders.made) == 4, "two replicas for each of the two evaluations"
    groups = as_groups(first)
    assert [(group.slot.group_id, len(group.trajectories)) for group in groups] == [(3, 2), (1, 2), (9, 2)]


def test_with_the_real_replay_buffer_every_issued_group_is_accounted_for(rig: Rig, tmp_path: Path) -> None:
    failing = Random(0)
    rig.orders.step_error = lambda seed, turn: OSError("disk") if failing.random() < 0.03 else None

    async def run() -> dict[str, int]:
        buffer = BufferSettings(groups_per_step=4, max_lag=1, max_failed_share=1.0)
        replay_buffer = ReplayBuffer(ReplayStore(tmp_path, TaskStream("count"), buffer, total_steps=5))
        worker = asyncio.create_task(rig.worker(replay_buffer, hurry=Random(1)).run())
        for version in range(1, 6):
            for group in map(decode, await replay_buffer.take(version - 1, timeout_s=20.0)):
                assert len(group.trainable) >= 2
            await replay_buffer.release(version)
            await replay_buffer.checkpointed(version)
        await worker
        counts = await replay_buffer.counts()
        await replay_buffer.close()
        return counts

    counts = asyncio.run(run())
    assert counts["trained"] == 20
    assert counts["issued"] == counts["trained"] + counts["dropped"] + counts["in_flight"]


def test_a_task_is_a_function_of_seed_and_group_only() -> None:
    stream, again, other = (
        TaskStream("x", {"b": 1, "a": 2}, 5),
        TaskStream("x", {"a": 2, "b": 1}, 5),
        TaskStream("x", {}, 6),
    )
    assert [stream(i) for i in (7, 0, 7)] == [again(i) for i in (7, 0, 7)]
    seeds = {stream(i).seed for i in range(2000)}
    assert len(seeds) > 1990
    assert not seeds & {other(i).seed for i in range(2000)}
    assert all(2**30 <= seed < 2**31 for seed in seeds), "seeds below are for held-out tasks"
    assert replace(stream(0), options="{}").env_id == "x"
