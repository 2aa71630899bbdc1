"""An environment in the worker's own process takes long: the event loop goes on, and the wait has an end."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from envs import call_thread, registry
from envs.base import TextEnv
from envs.hosting.host import EnvironmentFailed, EnvironmentTimeout, HostSettings, InProcessEnv
from envs.hosting.subprocess_env import SubprocessEnv
from learner.model.tokenizer import build_tokenizer
from rollout.agents.agent import Agent
from rollout.chat.chat import Chat
from rollout.engines.engine import Sampling
from rollout.engines.scripted_engine import ScriptedEngine
from rollout.episodes.episode import EpisodeLimits, EpisodeSpec, run_episode
from rollout.episodes.group import concurrently
from rollout.episodes.pool import EnvironmentPool
from rollout.wire.trajectory import EndReason, Slot, Task

AT_ONCE = call_thread._CALLS_PER_CORE * len(os.sched_getaffinity(0))


class Odd(TextEnv):
    """Does in its step what it was made with; the thread of everything it does is on record."""

    def __init__(self, doing: Callable[[], Any] = lambda: None) -> None:
        self.doing = doing
        self.threads: set[int] = set()
        self.closed = threading.Event()

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self.threads.add(threading.get_ident())
        return f"seed {seed}", {}

    def step(self, action: str) -> Any:
        self.threads.add(threading.get_ident())
        self.doing()
        return action, 1.0, True, False, {}

    def close(self) -> None:
        self.threads.add(threading.get_ident())
        self.closed.set()


class Async(Odd):
    """The same with coroutines, which share what belongs to one event loop."""

    async def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        self.loop = asyncio.get_running_loop()
        await asyncio.sleep(0)
        return f"seed {seed}", {}

    async def step(self, action: str) -> Any:
        assert asyncio.get_running_loop() is self.loop
        await asyncio.sleep(0)
        return action, 1.0, True, False, {}


def spin() -> None:
    while True:
        pass


def with_replica(env: Odd, act: Callable[[InProcessEnv], Any], **limits: float) -> Any:
    async def scene() -> Any:
        replica = await InProcessEnv.start(lambda: env, HostSettings(**limits), asyncio.Semaphore(4))  # type: ignore[arg-type]
        try:
            assert await replica.reset(3) == "seed 3"
            return await act(replica)
        finally:
            await replica.close()

    return asyncio.run(scene())


def test_the_loop_goes_on_while_every_environment_waits_and_so_many_wait_at_once() -> None:
    go_on, inside, most = threading.Event(), [0], [0]
    lock = threading.Lock()

    def wait() -> None:
        with lock:
            inside[0] += 1
            most[0] = max(most[0], inside[0])
        assert go_on.wait(30)
        with lock:
            inside[0] -= 1

    async def scene() -> None:
        pool = EnvironmentPool(lambda env_id: Odd(wait), HostSettings(where="inline"))
        task = Task.of("odd", 3)
        replicas = await concurrently(pool.take(task) for _ in range(AT_ONCE + 5))
        await concurrently(replica.reset(3) for replica in replicas)
        stepping = asyncio.create_task(concurrently(replica.step("on") for replica in replicas))
        while most[0] < AT_ONCE:  # the loop runs: nothing else could see it and end their wait
            await asyncio.sleep(0)
        go_on.set()
        assert len(await stepping) == len(replicas)
        for replica in replicas:
            pool.give_back(task, replica)
        await pool.close()

    asyncio.run(scene())
    assert most[0] == AT_ONCE


@pytest.mark.parametrize("doing", [spin, lambda: time.sleep(2)], ids=["spin", "sleep"])
def test_a_step_that_takes_too_long_costs_its_episode_and_says_where_it_stood(
    doing: Callable[[], Any],
) -> None:
    env = Odd(doing)

    async def act(replica: InProcessEnv) -> threading.Thread:
        with pytest.raises(
            EnvironmentTimeout, match=r"within 0.2 s \(env.host.step_seconds\).*test_inline.py:\d+\)"
        ):
            await replica.step("on")
        return replica._thread.thread

    thread = with_replica(env, act, step_seconds=0.2)
    thread.join(30)
    assert not thread.is_alive(), "what executes Python is ended"


def test_an_environment_that_exits_costs_its_episode_alone() -> None:
    async def act(replica: InProcessEnv) -> None:
        with pytest.raises(EnvironmentFailed, match=r"SystemExit\(3\)"):
            await replica.step("on")
        assert await replica.reset(4) == "seed 4"

    with_replica(Odd(lambda: sys.exit(3)), act)


def test_all_an_environment_does_is_done_in_one_thread_which_ends_with_it() -> None:
    env = Odd()

    async def act(replica: InProcessEnv) -> threading.Thread:
        assert await replica.step("on") == ("on", 1.0, True, False, {})
        return replica._thread.thread

    thread = with_replica(env, act)
    thread.join(30)
    assert env.closed.is_set() and not thread.is_alive()
    assert env.threads == {thread.ident} != {threading.get_ident()}


def test_an_environment_is_closed_when_it_returns_to_an_episode_that_was_given_up() -> None:
    entered, go_on = threading.Event(), threading.Event()

    def wait() -> None:
        entered.set()
        assert go_on.wait(30)

    env = Odd(wait)

    async def act(replica: InProcessEnv) -> None:
        step = asyncio.create_task(replica.step("on"))
        await asyncio.to_thread(entered.wait, 30)
        step.cancel()
        await asyncio.wait({step})

    with_replica(env, act)
    assert not env.closed.is_set()
    go_on.set()
    assert env.closed.wait(30)


def test_coroutines_of_an_environment_are_awaited_on_one_event_loop() -> None:
    async def act(replica: InProcessEnv) -> Any:
        return await replica.step("on")

    assert with_replica(Async(), act) == ("on", 1.0, True, False, {})


def test_an_environment_by_which_a_worker_may_have_died_gets_a_process() -> None:
    async def scene() -> None:
        pool = EnvironmentPool(host=HostSettings(where="inline"))
        task = Task.of("tests.rollout.trouble:Trouble", 1, {"what": "kill"})
        replica = await pool.take(task, own_process=True)
        await replica.reset(1)
        await replica.step("on")
        with pytest.raises(EnvironmentFailed, match="SIGKILL"):
            await replica.step("on")
        await pool.discard(task, replica)
        others = [await pool.take(task, own_process=own) for own in (False, True)]
        assert [type(each) for each in others] == [InProcessEnv, SubprocessEnv]
        for each in others:
            pool.give_back(task, each)
        assert [type(await pool.take(task, own_process=own)) for own in (False, True)] == [
            InProcessEnv,
            SubprocessEnv,
        ]
        for each in others:
            await pool.discard(task, each)

    asyncio.run(scene())


@pytest.mark.parametrize("stuck", [False, True], ids=["plays", "stuck"])
def test_an_episode_that_waits_behind_sleepers_has_its_whole_time_once_it_is_admitted(
    stuck: bool, tmp_path: Path
) -> None:
    go_on = threading.Event()

    class Sleepers(TextEnv):
        def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
            super().reset(seed=seed)
            return "on", {}

        def step(self, action: str) -> Any:
            if stuck:
                assert go_on.wait(30)
            return action, 1.0, True, False, {}

    async def scene() -> Any:
        gate, limits = asyncio.Semaphore(1), EpisodeLimits(max_turns=1, timeout_seconds=0.3)
        replica = await InProcessEnv.start(Sleepers, HostSettings(), gate)
        tokenizer = build_tokenizer(tmp_path)
        engine = ScriptedEngine(tokenizer, lambda prompt, random: "on")
        agent = Agent(engine, Chat(tokenizer), Sampling(max_tokens=4), 64)
        place = EpisodeSpec(Slot(0, 0, Task.of("sleepers", 1), 0), 0, 1)
        await gate.acquire()  # by those before it
        playing = asyncio.create_task(run_episode(replica, agent, place, limits))
        await asyncio.wait({playing}, timeout=2 * limits.timeout_seconds)
        assert not playing.done()
        gate.release()
        played = await playing
        go_on.set()
        await replica.close()
        return played

    played = asyncio.run(scene())
    assert played.end_reason is (EndReason.FAILED if stuck else EndReason.TERMINATED), played.error
    assert not stuck or "longer than 0.3 s and had played" in (played.error or "")


@pytest.mark.parametrize("own", [False, True], ids=["ours", "replaced"])
def test_a_step_that_returns_at_once_is_made_on_the_loop_unless_the_environment_is_a_users(
    own: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    env = Odd()
    if own:
        monkeypatch.setitem(registry._OURS, "frozen_lake", lambda: env)
    else:
        monkeypatch.setattr(registry, "_make_ours", lambda *_: env)

    async def scene() -> None:
        pool = EnvironmentPool()
        task = Task.of("frozen_lake", 3)
        replica = await pool.take(task)
        await replica.reset(3)
        await replica.step("on")
        pool.give_back(task, replica)
        await pool.close()

    asyncio.run(scene())
    assert (threading.get_ident() in env.threads) is not own
    assert len(env.threads) == (1 if own else 2)  # the rest is done in the replica's thread
