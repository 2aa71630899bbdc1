"""A rollout actor as a member of the fleet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import ray

from deploy.report.phases import Startup
from rollout.buffer.replay_store import EpisodeRow
from rollout.episodes.actors import BESIDE
from rollout.wire.metrics import Row
from rollout.wire.process_info import ProcessInfo
from rollout.wire.trajectory import Task
from rollout.wire.weights import SyncReport, WeightUpdate

Hear = Callable[[str, Sequence[str]], None]  # a part's name, and its notices


def actor(cls: type, groups: dict[str, int] | None = None, **options: Any) -> Any:
    """The class as an actor that claims nothing but what is asked for; groups: its concurrency groups."""
    made = ray.remote(concurrency_groups=groups)(cls) if groups else ray.remote(cls)
    return made.options(**({"num_cpus": 0} | options))


async def awaited(reference: Any) -> Any:
    """A reference as a coroutine, which is what asyncio's functions want."""
    return await reference


class ActorMember:
    """`deploy.cluster.member.Member` over a handle. With `native` weights the learner reaches the engines itself.

    hear: told of what the worker notices, with every heartbeat and at its end.
    """

    def __init__(
        self,
        name: str,
        handle: Any,
        native: bool = False,
        startup: Startup | None = None,
        hear: Hear | None = None,
    ) -> None:
        self.name = name
        self._hear = hear
        self._heard = 0
        self._startup = startup or Startup()
        self._handle = handle
        self._native = native

    async def start(self) -> ProcessInfo:
        with self._startup.timed("engines"):
            where: ProcessInfo = await self._handle.start.remote()
        return where

    async def sync(self, update: WeightUpdate) -> SyncReport:
        if self._native:
            return SyncReport(self.name, update.version, 0, 0.0, 0.0, 0.0)
        report: SyncReport = await self._handle.sync.remote(update)
        return report

    async def run(self) -> None:
        await self._handle.run.remote()

    async def evaluate(self, tasks: Sequence[Task], name: str) -> list[EpisodeRow]:
        rows: list[EpisodeRow] = await self._handle.evaluate.remote(tasks, name)
        return rows

    async def ping(self) -> None:
        await self._handle.ping.remote()
        await self._listen()

    async def standing(self) -> str:
        text: str = await self._handle.standing.options(concurrency_group=BESIDE).remote()
        return text

    async def stop(self) -> None:
        await self._handle.stop.remote()

    async def drain(self) -> None:
        await self._handle.drain.remote()

    async def counters(self) -> Row:
        row: Row = await self._handle.counters.remote()
        return row

    async def stacks(self) -> str:
        text: str = await self._handle.stacks.remote()
        return text

    async def close(self) -> None:
        await self._listen()
        await self._handle.close.remote()

    async def kill(self) -> None:
        # The handle is no more once its actor has ended; killing a stopped process takes the raylet some seconds.
        ray.kill(self._handle)

    async def _listen(self) -> None:
        if self._hear is not None:
            told: list[str] = await self._handle.notices.remote(self._heard)
            self._heard += len(told)
            self._hear(self.name, told)
