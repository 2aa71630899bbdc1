"""Where replicas claim room, and there is less of it than episodes, episodes take turns."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from envs.hosting.host import ClusterFull, Env, EnvironmentFailed, HostSettings, InProcessEnv
from envs.hosting.subprocess_env import SubprocessEnv
from rollout.episodes.pool import EnvironmentPool, Hosting
from rollout.wire.trajectory import Task
from tests.rollout.trouble import make

RAY = HostSettings(where="ray")
TASK, OTHER = Task.of("trouble", 1), Task.of("trouble", 1, {"what": "raise"})


class Cluster:
    """Has room for so many replicas, and gives what waits for it a few turns of the event loop."""

    def __init__(self, room: int) -> None:
        self.room = room

    async def start(self, recipe: Callable[[], Env], settings: HostSettings) -> InProcessEnv:
        for _ in range(5):
            await asyncio.sleep(0)
            if self.room:
                self.room -= 1
                return Claiming(recipe(), self)
        raise ClusterFull("there is no room")


class Claiming(InProcessEnv):
    def __init__(self, env: Env, cluster: Cluster) -> None:
        super().__init__(env)
        self._cluster = cluster

    async def close(self) -> None:
        self._cluster.room += 1


def test_where_there_is_no_room_episodes_take_turns(caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        cluster, most, playing = Cluster(2), 0, 0
        pool = EnvironmentPool(make, RAY, start=cluster.start)

        async def episode(number: int) -> None:
            nonlocal most, playing
            replica = await pool.take(TASK)
            playing += 1
            most = max(most, playing)
            for _ in range(number):
                await asyncio.sleep(0)
            playing -= 1
            pool.give_back(TASK, replica)

        async with asyncio.timeout(60):
            await asyncio.gather(*(episode(number) for number in range(20)))
        assert most == 2
        await pool.close()
        assert cluster.room == 2, "every replica was given back once"

    asyncio.run(run())
    assert "there is no room; episodes take turns on 2" in caplog.text


def test_without_any_replica_an_episode_does_not_wait_for_one() -> None:
    async def run() -> None:
        cluster = Cluster(1)
        pool = EnvironmentPool(make, RAY, start=cluster.start)
        only = await pool.take(TASK)
        waiting = asyncio.create_task(pool.take(TASK))
        for _ in range(20):
            await asyncio.sleep(0)
        assert not waiting.done()
        await pool.discard(TASK, only)
        replica = await waiting  # the room of the lost one is its own
        cluster.room = 0
        await pool.discard(TASK, replica)
        cluster.room = 0
        with pytest.raises(EnvironmentFailed, match=r"trouble \(seed 1\) failed in make: there is no room"):
            await pool.take(TASK)

    asyncio.run(run())


def test_what_another_environments_replica_claims_is_room() -> None:
    async def run() -> None:
        pool = EnvironmentPool(make, RAY, start=Cluster(1).start)
        for task in (TASK, OTHER, TASK):
            pool.give_back(task, await pool.take(task))

    asyncio.run(run())


def test_one_environment_may_be_hosted_elsewhere_than_the_others() -> None:
    async def run() -> None:
        pool = EnvironmentPool(make, hosting={OTHER.environment: Hosting(HostSettings(where="process"))})
        assert isinstance(await pool.take(TASK), InProcessEnv)
        replica = await pool.take(OTHER)
        assert isinstance(replica, SubprocessEnv)
        await pool.discard(OTHER, replica)

    asyncio.run(run())


def test_what_environments_of_one_run_claim_is_room_for_one_another() -> None:
    async def run() -> None:
        hosting = dict.fromkeys((TASK.environment, OTHER.environment), Hosting(RAY))
        pool = EnvironmentPool(make, start=Cluster(1).start, hosting=hosting)
        for task in (TASK, OTHER, TASK):
            pool.give_back(task, await pool.take(task))

    asyncio.run(run())


def test_a_pool_without_a_way_to_the_cluster_is_refused() -> None:
    with pytest.raises(ValueError, match=r"envs\.hosting\.actors\.Remote\.start"):
        EnvironmentPool(make, RAY)
