"""A member of the fleet and its state, from its start to its loss or its end."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

from deploy.assembly.runtime import first_failure
from deploy.cluster.member import Member, beat, explained
from deploy.config.supervise import SupervisionSettings, within
from rollout.engines.engine import SleepLevel
from rollout.wire.metrics import Row
from rollout.wire.process_info import ProcessInfo
from rollout.wire.weights import SyncReport, WeightMismatch, WeightUpdate

T = TypeVar("T")


@dataclass
class Entry:
    """A member and its state."""

    member: Member
    failed: asyncio.Future[None]
    where: ProcessInfo | None = None
    state: str = "starting"
    version: int = -1
    run: asyncio.Future[None] | None = None
    loading: bool = False  # a version; it may then be late with heartbeats
    asleep: bool = False  # its engine has given up its memory, until the next version
    killed: asyncio.Event = field(default_factory=asyncio.Event)
    counters: Row = field(default_factory=dict)  # the last known ones

    def lose(self, error: BaseException) -> None:
        """Have every wait for it raise this error, unless it is lost already."""
        if not self.failed.done():
            self.failed.set_exception(error)
            self.failed.exception()  # retrieved: possibly no task waits for it

    async def or_lost(self, pending: Coroutine[Any, Any, T]) -> T:
        """Await an answer; raises the member's error if it is lost meanwhile."""
        return await first_failure(asyncio.ensure_future(pending), [self.failed])

    async def watch(self, settings: SupervisionSettings, load_seconds: float) -> None:
        """Send heartbeats until one is not answered; a member that loads a version has `load_seconds` more."""
        while True:
            await asyncio.sleep(settings.heartbeat_interval_seconds)
            try:
                await beat(
                    self.member, settings.heartbeat_timeout_seconds, lambda: self.loading * load_seconds
                )
            except Exception as error:
                self.lose(await explained(error, self.member))
                return

    async def load(self, update: WeightUpdate, limit: float, what: str) -> SyncReport:
        """Have its engine load a version within the limit, seconds. what: the name of this in errors."""
        self.loading = True
        try:
            report = await within(limit, self.member.sync(update), f"{self.member.name} ({what})")
            self.asleep = False
            return report
        finally:
            self.loading = False

    async def sync(self, update: WeightUpdate, limit: float) -> SyncReport | None:
        """Bring a serving member to a version, or lose it: None. Raises WeightMismatch."""
        what = f"{'wake and ' if self.asleep else ''}sync to version {update.version}"
        try:
            report = await self.or_lost(self.load(update, limit, what))
        except WeightMismatch:
            raise
        except Exception as error:
            self.lose(error)
            self.state = "lost"
            return None
        self.version = report.version
        return report

    async def recount(self, limit: float) -> None:
        """Update its counters within the limit, seconds."""
        self.counters = await within(limit, self.member.counters(), self.member.name)

    async def count(self, limit: float) -> None:
        """Update its counters, or lose it."""
        try:
            await self.recount(limit)
        except Exception as error:
            self.lose(await explained(error, self.member))

    async def stop(self, limit: float) -> None:
        """Stop playing, with groups unfinished, or lose it."""
        try:
            await within(limit, self.member.stop(), self.member.name)
        except Exception as error:
            self.lose(error)

    async def sleep(self, level: SleepLevel, limit: float, limit_of_end: float) -> None:
        """Have its engine give up its memory, or lose the member and wait until it is killed. Limits in seconds."""
        self.asleep, self.loading = True, True
        try:
            await self.or_lost(within(limit, self.member.sleep(level), f"{self.member.name} (sleep)"))
        except Exception as error:
            self.lose(error)
            self.state = "lost"
            await within(limit_of_end, self.killed.wait(), f"the end of {self.member.name}")
        finally:
            self.loading = False
