"""A member of the fleet and its state, from its start to its loss or its end."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

from deploy.assembly.runtime import first_failure
from deploy.cluster.member import Member
from deploy.config.supervise import within
from rollout.engines.engine import SleepLevel
from rollout.wire.metrics import Row
from rollout.wire.process_info import ProcessInfo

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
