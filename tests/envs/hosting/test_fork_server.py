"""The fork server of replicas: what happens to children when it dies or hangs, and what they do not share."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from envs.base import text_space
from envs.hosting.fork_server import fork_server
from envs.hosting.host import EnvironmentFailed, EnvironmentTimeout, HostSettings
from envs.hosting.subprocess_env import CHILD, SubprocessEnv

HOST = HostSettings(where="process")


class Drawing(gym.Env[str, str]):
    """Says what it draws from the global generators, against the contract, and what it finds around it."""

    observation_space = text_space()
    action_space = text_space()

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        open_here = len(os.listdir("/proc/self/fd"))
        return f"{random.random()} {np.random.random()} {open_here} {os.environ.get('SAID', '')}", {}


def test_children_draw_for_themselves_and_hold_nothing_of_each_other() -> None:
    async def run() -> list[list[str]]:
        replicas = [await SubprocessEnv.start(Drawing, HOST) for _ in range(3)]
        said = [str(await replica.reset(1)).split(" ") for replica in replicas]
        for replica in replicas:
            await replica.close()
        return said

    said = asyncio.run(run())
    for draws in zip(*(each[:2] for each in said), strict=True):
        assert len(set(draws)) == 3
    assert len({each[2] for each in said}) == 1, "the last of them holds no more files open than the first"


def test_children_find_what_is_around_those_who_start_them(monkeypatch: pytest.MonkeyPatch) -> None:
    async def said() -> str:
        replica = await SubprocessEnv.start(Drawing, HOST)
        told = str(await replica.reset(1)).split(" ")[3]
        await replica.close()
        return told

    for word in ("one", "two"):
        monkeypatch.setenv("SAID", word)
        assert asyncio.run(said()) == word


def test_a_lost_fork_server_takes_its_children_and_is_replaced() -> None:
    async def run() -> None:
        first = await SubprocessEnv.start(Drawing, HOST)
        lost = fork_server(CHILD)
        lost.kill()
        lost._process.wait(60)
        with pytest.raises(EnvironmentFailed, match=r"died with exit code -9 \(SIGKILL\)"):
            await first.reset(1)
        await first.close()
        second = await SubprocessEnv.start(Drawing, HOST)
        await second.reset(1)
        await second.close()

    asyncio.run(run())


def test_a_stuck_fork_server_is_replaced() -> None:
    async def run() -> None:
        stuck = fork_server(CHILD)
        os.kill(stuck._process.pid, signal.SIGSTOP)
        with pytest.raises(EnvironmentTimeout, match="start_seconds"):
            await SubprocessEnv.start(Drawing, HOST.model_copy(update={"start_seconds": 0.2}))
        stuck._process.wait(60)
        replica = await SubprocessEnv.start(Drawing, HOST)
        assert fork_server(CHILD) is not stuck
        await replica.close()

    asyncio.run(run())
