"""A replica in a process of its own says what one in this process says, and can be lost without loss."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from envs import registry
from envs.host import HostSettings
from envs.hosted import Hosted
from rollout.agent import Agent
from rollout.episode import Limits, Place
from rollout.group import concurrently, play, run_group
from rollout.pool import EnvironmentPool
from rollout.scripted_engine import ScriptedEngine
from rollout.wire.trajectory import EndReason, Group, Slot, Task, Trajectory
from tests.rollout.trouble import Trouble, make

AgentOf = Callable[..., Agent]
PROCESS = HostSettings(where="process", step_seconds=2.0)
LIMITS = Limits(max_turns=9, seconds=60.0)


@pytest.fixture
def agent(tokenizer: PreTrainedTokenizerFast, agent_of: AgentOf) -> Agent:
    words = ["left", "right", "down", "up", "0", "1"]
    return agent_of(ScriptedEngine(tokenizer, lambda prompt, rng: rng.choice(words)), context_tokens=4096)


@pytest.mark.parametrize("task", [Task.of("frozen_lake", 9, {"slippery": True}), Task.of("Taxi-v4", 9)])
def test_a_hosted_replica_says_what_an_inline_one_says(agent: Agent, task: Task) -> None:
    async def group(host: HostSettings) -> Group:
        pool = EnvironmentPool(host=host)
        try:
            return await run_group(Slot(3, 0, task, 0), pool, agent, 3, LIMITS, run_seed=1)
        finally:
            await pool.close()

    def facts(trajectory: Trajectory) -> list[Any]:
        steps = [(s.observation, s.action, s.reward) for s in trajectory.steps]
        return [trajectory.end_reason, trajectory.success, steps]

    hosted, inline = (asyncio.run(group(host)) for host in (PROCESS, HostSettings()))
    assert [facts(t) for t in hosted.trajectories] == [facts(t) for t in inline.trajectories]
    assert EndReason.FAILED not in {t.end_reason for t in hosted.trajectories}


def test_whatever_happens_to_a_replica_costs_its_own_episode_only(agent: Agent) -> None:
    troubles = ["none", "kill", "exit", "raise", "sleep", "freeze"]
    says = {
        "kill": r"its process \d+ died with exit code -9 \(SIGKILL\)",
        "exit": r"its process \d+ died with exit code 3",
        "raise": "ZeroDivisionError: no such tile",
        "sleep": r"process \d+ did not answer within 2 s \(env.host.step_seconds\) and was killed",
        "freeze": r"process \d+ did not answer within 2 s \(env.host.step_seconds\) and was killed",
    }

    async def all_at_once() -> None:
        pool = EnvironmentPool(make, PROCESS)

        async def played(what: str) -> Trajectory:
            place = Place(Slot(0, 0, Task.of("trouble", 1, {"what": what}), 0), 0, seed=1)
            return await play(place, pool, agent, LIMITS)

        for _ in range(2):  # the second time shows that a lost replica is replaced
            trajectories = await concurrently(played(what) for what in troubles)
            ends = dict(zip(troubles, trajectories, strict=True))
            assert ends.pop("none").end_reason is EndReason.TERMINATED
            for what, trajectory in ends.items():
                assert trajectory.end_reason is EndReason.FAILED
                assert trajectory.error is not None
                assert re.search(says[what], trajectory.error), trajectory.error
                assert len(trajectory.steps) == 2, "the action that broke it is kept"
        replicas = [replica for idle in pool._idle.values() for replica in idle]
        assert len(replicas) == 1, "the good one was reused"
        assert isinstance(replicas[0], Hosted)
        await pool.close()
        assert not Path(f"/proc/{replicas[0].pid}").exists()

    asyncio.run(all_at_once())


def test_a_replica_killed_from_outside_is_replaced(agent: Agent) -> None:
    async def run() -> None:
        pool = EnvironmentPool(make, PROCESS)
        task = Task.of("trouble", 1)
        replica = await pool.take(task)
        assert isinstance(replica, Hosted)
        pool.give_back(task, replica)
        os.kill(replica.pid, signal.SIGKILL)
        ends = [
            (await play(Place(Slot(0, 0, task, 0), 0, 1), pool, agent, LIMITS)).end_reason for _ in range(2)
        ]
        assert ends == [EndReason.FAILED, EndReason.TERMINATED]
        await pool.close()

    asyncio.run(run())


def test_an_environment_that_cannot_be_made_there_says_why(agent: Agent) -> None:
    async def run() -> Trajectory:
        pool = EnvironmentPool(host=PROCESS)
        place = Place(Slot(0, 0, Task.of("frozen_lake", 1, {"size": 1}), 0), 0, 1)
        return await play(place, pool, agent, LIMITS)

    error = asyncio.run(run()).error
    assert error is not None
    assert "size=1 leaves no room for start and goal" in error


def test_what_was_registered_here_is_known_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_OURS", dict(registry._OURS))
    registry.register("trouble", Trouble)

    async def run() -> None:
        pool = EnvironmentPool(host=PROCESS)
        replica = await pool.take(Task.of("trouble", 1))
        assert await replica.reset(1) == "begin"
        await pool.discard(Task.of("trouble", 1), replica)

    asyncio.run(run())


def test_a_snapshot_goes_on_in_another_process() -> None:
    async def run() -> None:
        pool = EnvironmentPool(make, PROCESS)
        first, second = [await pool.take(Task.of("trouble", 1)) for _ in range(2)]
        await first.reset(1)
        await first.step("a")
        await first.step("b")
        snapshot = first.snapshot()
        assert snapshot == b"turn 2"
        await second.reset(1)
        await second.restore(snapshot)
        assert await second.step("c") == await first.step("c") == ("3", 0.5, True, False, {})
        assert first.snapshot() is None, "of a final state nobody goes on"
        for replica in (first, second):
            await replica.close()

    asyncio.run(run())


PARENT = """
import asyncio, os, signal
from envs.host import HostSettings
from rollout.pool import EnvironmentPool
from rollout.wire.trajectory import Task
from tests.rollout.trouble import make

async def main():
    pool = EnvironmentPool(make, HostSettings(where="process"))
    replica = await pool.take(Task.of("trouble", 1, {"what": "sleep"}))
    await replica.reset(1)
    await replica.step("a")
    asyncio.ensure_future(replica.step("sleep for ever"))
    await asyncio.sleep(0)
    print(replica.pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""


def test_a_replica_dies_with_its_parent_however_that_dies() -> None:
    parent = subprocess.run([sys.executable, "-c", PARENT], capture_output=True, text=True)
    assert parent.returncode == -signal.SIGKILL, parent.stderr
    status = Path(f"/proc/{int(parent.stdout)}/stat")
    for _ in range(1000):
        # Whoever inherits the orphan may be slow to bury it.
        if not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.01)
    raise AssertionError("the replica outlived its parent by ten seconds")
