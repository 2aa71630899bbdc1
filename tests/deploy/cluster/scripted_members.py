"""Members of a fleet that are scripted to die, freeze and refuse, and what surrounds it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Any

from deploy.cluster.fleet import Fleet
from deploy.config.supervise import SupervisionSettings, TimeLimits
from rollout.buffer.replay_store import EpisodeRow
from rollout.episodes.evaluation import EvaluationPlan
from rollout.wire.process_info import ProcessInfo
from rollout.wire.trajectory import EndReason, Task
from rollout.wire.weights import Handle, Probe, SyncReport, WeightManifest, WeightMismatch, WeightUpdate

QUICK = SupervisionSettings(
    heartbeat_interval_seconds=0.01,
    heartbeat_timeout_seconds=1.0,
    max_restarts=2,
    restart_window_seconds=1000,
    drain_timeout_seconds=1,
)


def update(version: int) -> WeightUpdate:
    return WeightUpdate(WeightManifest(version, (), Probe((), (), 0.0)), Handle("", ""))


class Scripted:
    """A member that does as it is told: `dead`, `frozen`, or refusing a version."""

    def __init__(self, name: str, world: World) -> None:
        self.name = name
        self.world = world
        self.version = -1
        self.dead = self.frozen = self.drained = False
        self.asleep = self.sleepless = self.wakes_late = False
        self.killed = asyncio.Event()
        self.stopped = asyncio.Event()

    async def _lives(self) -> None:
        if self.dead:
            raise ConnectionError(f"{self.name} is dead")
        if self.frozen:
            await asyncio.Event().wait()

    async def start(self) -> ProcessInfo:
        if self.name in self.world.stillborn:
            raise OSError(f"{self.name} finds no device")
        await self._lives()
        return ProcessInfo("host", 1, "node", f"{self.name}.log")

    async def sync(self, update: WeightUpdate) -> SyncReport:
        await asyncio.sleep(0.005)
        await self._lives()
        if self.asleep and self.wakes_late:
            await asyncio.Event().wait()
        self.asleep = False
        if self.name in self.world.refusing:
            raise WeightMismatch("tensor lm_head arrived with another checksum")
        self.version = update.version
        return SyncReport(self.name, update.version, 0, 0.0, 0.0, 0.0)

    async def sleep(self, level: int) -> None:
        await self._lives()
        if self.sleepless:
            raise RuntimeError(f"{self.name} cannot sleep")
        self.asleep = True

    async def run(self) -> None:
        self.world.ran.append((self.name, self.version))
        self.stopped.clear()
        while not (self.stopped.is_set() or self.drained):
            await asyncio.sleep(0.002)
            await self._lives()

    async def evaluate(self, tasks: Sequence[Task], name: str, plan: EvaluationPlan) -> list[EpisodeRow]:
        await asyncio.sleep(0.02)
        await self._lives()
        return [
            EpisodeRow(task.seed, EndReason.TERMINATED, 1.0, True, 1, 1, self.version, None)
            for task in tasks
            for _ in range(plan.samples)
        ]

    async def ping(self) -> None:
        await self._lives()

    async def standing(self) -> str:
        return "its event loop has been blocked for 30 s in step (maze.py:33)" if self.frozen else ""

    async def stop(self) -> None:
        await self._lives()
        self.stopped.set()

    async def drain(self) -> None:
        await self._lives()
        self.drained = True

    async def counters(self) -> dict[str, float]:
        await self._lives()
        return {"turns": 1.0}

    async def close(self) -> None:
        await self._lives()

    async def kill(self) -> None:
        self.killed.set()


class World:
    """What surrounds the fleet: who was launched, what the learner lends, what the replay buffer heard."""

    def __init__(self) -> None:
        self.members: dict[str, Scripted] = {}
        self.ran: list[tuple[str, int]] = []
        self.reassigned: list[str] = []
        self.said: list[str] = []
        self.stillborn: set[str] = set()
        self.refusing: set[str] = set()
        self.version = 0

    def fleet(self, settings: SupervisionSettings = QUICK) -> Fleet:
        return Fleet(
            self.launch,
            self.lend,
            self.reassign,
            settings,
            TimeLimits(1.0, 1.0, 1.0, 0.0, 1.0),
            self.said.append,
        )

    def launch(self, name: str) -> Scripted:
        self.members[name] = Scripted(name, self)
        return self.members[name]

    @asynccontextmanager
    async def lend(self) -> AsyncIterator[WeightUpdate]:
        yield update(self.version)

    async def reassign(self, worker: str, lost: str) -> int:
        member = self.members[worker]
        assert member.killed.is_set() if lost else member.drained
        self.reassigned.append(worker)
        return 3


def play(script: Callable[[World, Fleet], Coroutine[Any, Any, None]], world: World | None = None) -> World:
    world = world or World()

    async def scene() -> None:
        fleet = world.fleet()
        try:
            async with asyncio.timeout(20):
                await script(world, fleet)
        finally:
            await fleet.close()

    asyncio.run(scene())
    assert all(member.killed.is_set() for member in world.members.values())
    return world


async def until(holds: Callable[[], bool]) -> None:
    while not holds():
        await asyncio.sleep(0.002)
