"""A rollout actor as a member of the fleet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ray

from deploy.report.noticed import Hear
from deploy.report.phases import Startup
from rollout.episodes.actors import BESIDE
from rollout.wire.process_info import ProcessInfo
from rollout.wire.weights import SyncReport, WeightUpdate


def _forwarded(method: str) -> Any:
    """A method that awaits the actor's method of this name."""

    async def call(self: ActorMember, *arguments: Any) -> Any:
        return await getattr(self._handle, method).remote(*arguments)

    return call


class ActorMember:
    """`deploy.cluster.member.Member` over an actor's handle.

    hear: receives the worker's notices, with every heartbeat and at the end. apart: whether weights go to a node as
    deltas.
    """

    def __init__(
        self,
        name: str,
        handle: Any,
        startup: Startup | None = None,
        hear: Hear | None = None,
        apart: Callable[[str], bool] = lambda node: False,
    ) -> None:
        self.name = name
        self._hear = hear
        self._heard = 0
        self._startup = startup or Startup()
        self._handle = handle
        self._apart = apart
        self._node = ""

    run, evaluate, stop, drain, counters, sleep = map(
        _forwarded, ("run", "evaluate", "stop", "drain", "counters", "sleep")
    )

    async def start(self) -> ProcessInfo:
        with self._startup.timed("engines"):
            where: ProcessInfo = await self._handle.start.remote()
        self._node = where.node
        return where

    async def sync(self, update: WeightUpdate) -> SyncReport:
        report: SyncReport = await self._handle.sync.remote(update, self._apart(self._node))
        return report

    async def ping(self) -> None:
        await self._handle.ping.remote()
        await self._listen()

    async def standing(self) -> str:
        text: str = await self._handle.standing.options(concurrency_group=BESIDE).remote()
        return text

    async def close(self) -> None:
        await self._listen()
        await self._handle.close.remote()

    async def kill(self) -> None:
        # Killing a stopped process takes the raylet some seconds.
        ray.kill(self._handle)

    async def _listen(self) -> None:
        if self._hear is not None:
            told: list[str] = await self._handle.notices.remote(self._heard)
            self._heard += len(told)
            self._hear(self.name, told)
