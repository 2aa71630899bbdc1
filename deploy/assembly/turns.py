"""Engines and learner in turns on the same devices (`cluster.colocate`): one of the two holds their memory at a time.

    whose turn   engines                            learner
    engines      hold weights and KV cache, play    away: its state is in host memory
    learner      asleep                             holds its state, learns, publishes

It begins as the learner's, before there are engines. A turn is passed on only when the side that had it holds nothing
any more. An engine that starts later, in the place of a lost one, waits for the engines' turn; the learner waits for
those that are starting. `step_in_turn` is a learner step with both changes.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from enum import Enum
from typing import Protocol

from deploy.assembly.runtime import waited_for
from deploy.config.config import RunConfig
from learner.data.batch_checks import GroupsRefused
from rollout.engines.engine import SleepLevel
from rollout.wire.metrics import Row, joined
from rollout.wire.trajectory import DropReason


class Side(Enum):
    """Who may hold memory of the devices; NOBODY: a turn is being passed on."""

    ENGINES = "engines"
    LEARNER = "learner"
    NOBODY = "nobody"


class Turns:
    """Whose turn it is. All calls come from one event loop, and may be cancelled and repeated.

    sleep: returns when no engine holds memory, those that did not obey are ended; onload and offload: move the
    learner's state. Each is called again where a call before it failed, and has its own time limit.
    """

    def __init__(
        self,
        sleep: Callable[[], Awaitable[object]],
        onload: Callable[[], Awaitable[object]],
        offload: Callable[[], Awaitable[object]],
    ) -> None:
        self._sleep, self._onload, self._offload = sleep, onload, offload
        self._passing = asyncio.Lock()
        self._changed = asyncio.Event()  # set and replaced at every change of the state below
        self._starting = 0  # engines that are being started
        self.side = Side.LEARNER

    async def learner(self) -> None:
        """Make it the learner's turn; returns when its state is on the device."""
        async with self._passing:
            if self.side is not Side.LEARNER:
                await self._end_of_engines()
                await self._onload()
                self._become(Side.LEARNER)

    async def new_learner(self) -> None:
        """The same for a learner that takes a lost one's place: it starts with its state on the device."""
        async with self._passing:
            await self._end_of_engines()
            self._become(Side.LEARNER)

    async def engines(self) -> None:
        """Make it the engines' turn; returns when the learner holds nothing. They wake up as they load a version."""
        async with self._passing:
            if self.side is not Side.ENGINES:
                await self._offload()
                self._become(Side.ENGINES)

    @asynccontextmanager
    async def starting(self) -> AsyncIterator[None]:
        """Start an engine, in the engines' turn, which does not end meanwhile."""
        while self.side is not Side.ENGINES:
            await self._changed.wait()
        self._starting += 1
        try:
            yield
        finally:
            self._starting -= 1
            self._wake()

    async def _end_of_engines(self) -> None:
        self._become(Side.NOBODY)
        while self._starting:
            await self._changed.wait()
        await self._sleep()

    def _become(self, side: Side) -> None:
        self.side = side
        self._wake()

    def _wake(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()


def sleep_level(config: RunConfig) -> SleepLevel:
    """How deeply engines sleep: the next version brings all weights, unless it is an adapter for those they have."""
    lora = config.learner.model.lora
    return 1 if lora is not None and lora.sync == "adapter" else 2


class Groups(Protocol):
    """The replay buffer, near or far."""

    async def gather(self, version: int, timeout_s: float) -> None: ...
    async def discard(self, version: int, reason: DropReason) -> None: ...


async def step_in_turn(
    turns: Turns,
    number: int,
    groups: Groups,
    seconds: float,
    train: Callable[[int, bool], Awaitable[Row]],
    publish: Callable[[], Awaitable[object]],
    before: Awaitable[object] | None,
) -> tuple[Row, Row]:
    """Learner step `number`; it ends in the learner's turn, with a version that is not published yet.

    seconds: what its groups are waited for at most; train: `LearnerLoop.train`; where it refuses the groups, engines
    load the version before once more (publish), and play others; before: what engines play besides, such as an
    evaluation. Returns the step's metrics, and how long `before` was waited for.
    """
    waited: Row = {}
    played_s = 0.0
    while True:
        began = time.perf_counter()
        await groups.gather(number - 1, seconds)
        played_s += time.perf_counter() - began
        if before is not None:
            waited, before = await waited_for(before), None
        began = time.perf_counter()
        await turns.learner()
        passed_s = time.perf_counter() - began
        try:
            row = await train(number, False)
        except GroupsRefused:
            await publish()
            await groups.discard(
                number - 1, DropReason.NONFINITE
            )  # not earlier: new groups are issued at once
            continue
        return joined(row | {"wait_s": row["wait_s"] + played_s}, {"onload_s": passed_s}), waited
