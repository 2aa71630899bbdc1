"""A worker that waits for a replica which never answers; a module of its own, so that its actor starts quickly."""

from __future__ import annotations

import asyncio
import os
from functools import partial

from envs.hosting.actors import RemoteEnv
from envs.hosting.host import HostSettings
from tests.rollout.trouble import make


class Owner:
    """An actor's class."""

    async def begin(self, host: HostSettings) -> tuple[int, int]:
        """Pids of this process and of its replica's actor."""
        self.replica = await RemoteEnv.start(partial(make, "trouble", what="sleep"), host)
        await self.replica.reset(1)
        await self.replica.step("a")
        self.waiting = asyncio.ensure_future(self.replica.step("sleep for ever"))
        await asyncio.sleep(0)
        return os.getpid(), self.replica.pid
