"""A replica in a process of its own, here or on a Ray cluster, says what one in this process says, and can be lost
without loss.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest
from transformers import PreTrainedTokenizerFast

from deploy.assembly.build import replica_start
from envs import registry
from envs.hosting.host import EnvironmentFailed, HostSettings, Replica
from envs.hosting.subprocess_env import SubprocessEnv
from rollout.agents.agent import Agent
from rollout.engines.scripted_engine import ScriptedEngine
from rollout.episodes.episode import EpisodeLimits, EpisodeSpec
from rollout.episodes.group import concurrently, play, run_group
from rollout.episodes.pool import EnvironmentPool
from rollout.wire.trajectory import EndReason, Group, Slot, Task, Trajectory
from tests.rollout.trouble import Starter, Trouble, make

AgentOf = Callable[..., Agent]
PROCESS = HostSettings(where="process", step_seconds=5.0)
RAY = HostSettings(where="ray", step_seconds=5.0, cpus_per_replica=0.01)
LIMITS = EpisodeLimits(max_turns=9, timeout_seconds=60.0)


@pytest.fixture
def agent(tokenizer: PreTrainedTokenizerFast, agent_of: AgentOf) -> Agent:
    words = ["left", "right", "down", "up", "0", "1"]
    return agent_of(ScriptedEngine(tokenizer, lambda prompt, rng: rng.choice(words)), context_tokens=4096)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    import ray
    from ray.cluster_utils import Cluster

    started = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    ray.init(address=started.address, log_to_driver=False, logging_level="ERROR")
    yield started
    ray.shutdown()
    started.shutdown()


@pytest.fixture(params=["process", pytest.param("ray", marks=pytest.mark.slow)])
def host(request: pytest.FixtureRequest) -> HostSettings:
    """Where replicas live that are not this process's."""
    if request.param == "process":
        return PROCESS
    request.getfixturevalue("cluster")
    return RAY


def pool_of(host: HostSettings, make: Callable[..., Any] = make) -> EnvironmentPool:
    return EnvironmentPool(make, host, start=replica_start(host))


def pid_of(replica: Replica) -> int:
    """Of a replica's own process, or of its actor."""
    pid: int = replica.pid  # type: ignore[attr-defined]
    return pid


def idle_of(pool: EnvironmentPool) -> list[Replica]:
    return [replica for _, replica in pool._all_idle()]


async def played(
    pool: EnvironmentPool, agent: Agent, task: Task, limits: EpisodeLimits = LIMITS
) -> Trajectory:
    return await play(EpisodeSpec(Slot(0, 0, task, 0), 0, seed=1), pool, agent, limits)


def wait_for_the_end_of(*pids: int) -> None:
    """Of processes that nobody here waits for: whoever inherits an orphan may be slow to bury it."""
    deadline = time.monotonic() + 30
    for pid in pids:
        while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline, f"process {pid} is still there after 30 s"
            time.sleep(0.01)


@pytest.mark.parametrize("task", [Task.of("frozen_lake", 9, {"slippery": True}), Task.of("Taxi-v4", 9)])
def test_a_hosted_replica_says_what_an_inline_one_says(agent: Agent, task: Task, host: HostSettings) -> None:
    async def group(host: HostSettings) -> Group:
        pool = pool_of(host, registry.make)
        try:
            return await run_group(Slot(3, 0, task, 0), pool, agent, 2, LIMITS, run_seed=1)
        finally:
            await pool.close()

    def facts(trajectory: Trajectory) -> list[Any]:
        steps = [(s.observation, s.action, s.reward) for s in trajectory.turns]
        return [trajectory.end_reason, trajectory.success, steps]

    hosted, inline = (asyncio.run(group(each)) for each in (host, HostSettings()))
    assert [facts(t) for t in hosted.trajectories] == [facts(t) for t in inline.trajectories]
    assert EndReason.FAILED not in {t.end_reason for t in hosted.trajectories}


def test_whatever_happens_to_a_replica_costs_its_own_episode_only(agent: Agent, host: HostSettings) -> None:
    killed = r"process \d+ did not answer within 5 s \(env.host.step_seconds\) and was killed"
    says = {
        "kill": r"its process \d+ died with exit code -9 \(SIGKILL\)",
        "exit": r"its process \d+ died with exit code 3",
        "raise": "ZeroDivisionError: no such tile",
        "sleep": killed,
        "freeze": killed,
        "spin": killed,
    }
    # Behind an actor it is the same process: there a few will do.
    troubles = ["none", *says] if host is PROCESS else ["none", "exit", "raise", "sleep", "spin"]

    async def all_at_once() -> None:
        pool = pool_of(host)
        for _ in range(2 if host is PROCESS else 1):  # the second time shows that a lost replica is replaced
            trajectories = await concurrently(
                played(pool, agent, Task.of("trouble", 1, {"what": what})) for what in troubles
            )
            ends = dict(zip(troubles, trajectories, strict=True))
            assert ends.pop("none").end_reason is EndReason.TERMINATED
            for what, trajectory in ends.items():
                assert trajectory.end_reason is EndReason.FAILED
                assert trajectory.error is not None
                assert re.search(says[what], trajectory.error), trajectory.error
                assert len(trajectory.turns) == 2, "the action that broke it is kept"
        (good,) = idle_of(pool)
        pool.give_back(Task.of("trouble", 1, {"what": "none"}), good)
        await pool.close()
        wait_for_the_end_of(pid_of(good))

    asyncio.run(all_at_once())


@pytest.mark.parametrize("how", ["is closed", "leaves"])
def test_what_a_replica_has_started_ends_with_it(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")

    async def run() -> int:
        replica = await SubprocessEnv.start(Starter, PROCESS)
        pid, _, inherited = str(await replica.reset(1)).partition(" ")
        assert inherited == "[]"
        if how == "leaves":
            with pytest.raises(EnvironmentFailed, match="exit code 3"):
                await replica.step("leave")
        await replica.close()
        return int(pid)

    wait_for_the_end_of(asyncio.run(run()))


def test_a_replica_killed_from_outside_is_replaced(agent: Agent, host: HostSettings) -> None:
    async def run() -> None:
        pool = pool_of(host)
        task = Task.of("trouble", 1)
        replica = await pool.take(task)
        pool.give_back(task, replica)
        os.kill(pid_of(replica), signal.SIGKILL)
        ends = [(await played(pool, agent, task)).end_reason for _ in range(2)]
        assert ends == [EndReason.FAILED, EndReason.TERMINATED]
        await pool.close()

    asyncio.run(run())


def test_an_environment_that_cannot_be_made_there_says_why(agent: Agent, host: HostSettings) -> None:
    pool = pool_of(host, registry.make)
    error = asyncio.run(played(pool, agent, Task.of("frozen_lake", 1, {"size": 1}))).error
    assert error is not None
    assert "size=1 leaves no room for start and goal" in error


def test_what_was_registered_here_is_known_there(monkeypatch: pytest.MonkeyPatch, host: HostSettings) -> None:
    monkeypatch.setattr(registry, "_OURS", dict(registry._OURS))
    registry.register("trouble", Trouble)

    async def run() -> None:
        pool = pool_of(host, registry.make)
        task = Task.of("trouble", 1, {"nondeterministic": True})
        replica = await pool.take(task)
        assert replica.nondeterministic, "it is known here, too, what it says of itself"
        assert await replica.reset(1) == "begin"
        await pool.discard(task, replica)

    asyncio.run(run())


def test_a_snapshot_goes_on_in_another_process(host: HostSettings) -> None:
    async def run() -> None:
        pool = pool_of(host)
        first, second = [await pool.take(Task.of("trouble", 1)) for _ in range(2)]
        await first.reset(1)
        await first.step("a")
        await first.step("b")
        snapshot = first.snapshot()
        assert snapshot == b"turn 2"
        await second.reset(1)
        await second.restore(snapshot)
        ended = ("3", 0.5, True, False, {"success": True})  # of info what means something to Manta
        assert await second.step("c") == await first.step("c") == ended
        assert first.snapshot() is None, "of a final state nobody goes on"
        for replica in (first, second):
            await replica.close()

    asyncio.run(run())


PARENT = """
import asyncio, os, signal
from envs.hosting.host import HostSettings
from rollout.episodes.pool import EnvironmentPool
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
    parent = subprocess.run([sys.executable, "-c", PARENT], capture_output=True, text=True, encoding="utf-8")
    assert parent.returncode == -signal.SIGKILL, parent.stderr
    wait_for_the_end_of(int(parent.stdout))


@pytest.mark.slow
def test_a_replicas_actor_and_process_end_with_their_worker_however_that_dies(cluster: Any) -> None:
    import ray

    from tests.rollout.replica_owner import Owner

    owner = ray.remote(Owner).options(num_cpus=0).remote()
    worker, actor = ray.get(owner.begin.remote(RAY.model_copy(update={"step_seconds": 3600.0})), timeout=120)
    processes = psutil.Process(actor).children(recursive=True)
    assert len(processes) == 2, "the replica's and its fork server"
    os.kill(worker, signal.SIGKILL)
    wait_for_the_end_of(worker, actor, *(process.pid for process in processes))


@pytest.mark.slow
def test_an_actor_that_freezes_is_given_up(
    cluster: Any, agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("envs.hosting.actors.MARGIN_SECONDS", 0.5)

    async def run() -> None:
        pool = pool_of(RAY.model_copy(update={"reset_seconds": 0.5}))
        task = Task.of("trouble", 1)
        replica = await pool.take(task)
        processes = psutil.Process(pid_of(replica)).children(recursive=True)
        pool.give_back(task, replica)
        os.kill(pid_of(replica), signal.SIGSTOP)
        failed = await played(pool, agent, task)
        assert failed.end_reason is EndReason.FAILED
        assert failed.error is not None
        said = rf"its actor \(pid {pid_of(replica)} on \S+\) did not answer within 1 s and was killed"
        assert re.search(said, failed.error), failed.error
        wait_for_the_end_of(pid_of(replica), *(process.pid for process in processes))

    asyncio.run(run())


@pytest.mark.slow
def test_replicas_live_on_nodes_that_have_what_they_claim_and_are_lost_with_them(
    cluster: Any, agent: Agent
) -> None:
    node = cluster.add_node(num_cpus=1, resources={"cpu_node": 1})
    raylet = node.all_processes["raylet"][0].process.pid
    claiming = RAY.model_copy(update={"cpus_per_replica": 0.0, "resources": {"cpu_node": 0.5}})
    task = Task.of("trouble", 1)

    async def run() -> None:
        pool = pool_of(claiming)
        first, second = await asyncio.gather(pool.take(task), pool.take(task))
        assert {psutil.Process(pid_of(each)).ppid() for each in (first, second)} == {raylet}
        waiting = asyncio.create_task(pool.take(task))  # for which there is no room
        pool.give_back(task, first)
        assert await waiting is first
        pool.give_back(task, first)
        await pool.discard(task, second)
        cluster.remove_node(node, allow_graceful=False)
        wait_for_the_end_of(pid_of(first))  # what a lost raylet leaves behind ends a moment later
        failed = await played(pool, agent, task)
        assert failed.end_reason is EndReason.FAILED
        assert failed.error is not None
        assert f"its actor (pid {pid_of(first)} on " in failed.error

        pool = pool_of(claiming.model_copy(update={"start_seconds": 1.0}))
        error = (await played(pool, agent, task)).error
        assert error is not None
        assert "no node of the cluster had room for it within 1 s (env.host.start_seconds)" in error
        assert "it claims 0 CPU, 0.5 cpu_node" in error

    asyncio.run(run())
