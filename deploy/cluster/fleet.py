"""The fleet: start, weight sync, supervision, replacement and scaling of a run's rollout workers.

Plain asyncio over `Member`s, which are Ray actors or objects of this process.

    index       the number of a worker; its successive members are rollout-1, rollout-1.1, rollout-1.2
    admitted    a member that holds the current version, proved by checksums and probe; only such members sample
    lost        a member that died, raised, or did not answer a heartbeat in time: it is killed, its groups are
                reassigned, and the index starts its next member within the restart budget

Publishing waits for every admitted member or for its loss, so a step never waits for a lost one.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, nullcontext
from dataclasses import asdict
from typing import Any

from deploy.cluster.distributed_evaluation import evaluate_on
from deploy.cluster.entry import Entry
from deploy.cluster.member import Member
from deploy.config.supervise import (
    Budget,
    PartFailed,
    PartLost,
    SupervisionSettings,
    TimeLimits,
    brief,
    within,
)
from rollout.buffer.replay_store import EpisodeRow
from rollout.engines.engine import SleepLevel
from rollout.episodes.evaluation import ONCE, EvaluationPlan
from rollout.wire.metrics import Row
from rollout.wire.trajectory import Task
from rollout.wire.weights import SyncReport, WeightMismatch, WeightUpdate

_LAST_COUNT_SECONDS = 2.0  # for a member that is ended to say what it has sampled


class Fleet:
    """The rollout workers of a run. All calls come from one event loop.

    launch: makes a member by name; lend: provides the current version for the time of a block; reassign: tells the
    replay buffer that a worker has left, with the error of one that was lost, and returns the number of its groups;
    left: told that a worker has ended and is not replaced; turn: held while a member starts, which may have to wait for
    its turn on a shared device; say: prints a message for the user.
    `failed` is a future that ends with the error that stops the run.
    """

    def __init__(
        self,
        launch: Callable[[str], Member],
        lend: Callable[[], AbstractAsyncContextManager[WeightUpdate]],
        reassign: Callable[[str, str], Awaitable[int]],
        settings: SupervisionSettings,
        limits: TimeLimits,
        say: Callable[[str], None],
        budget: Budget | None = None,
        left: Callable[[str], None] = lambda worker: None,
        turn: Callable[[], AbstractAsyncContextManager[None]] = nullcontext,
    ) -> None:
        self._launch = launch
        self._lend = lend
        self._reassign = reassign
        self._left = left
        self._turn = turn
        self._settings = settings
        self._limits = limits
        self._say = say
        self.budget = budget or Budget(settings)
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._keepers: dict[int, asyncio.Task[None]] = {}
        self._entries: dict[int, Entry] = {}
        self._wanted = 0
        self._version = -1
        self._weights = asyncio.Lock()  # the version does not advance while a member is admitted to it
        self._changed = asyncio.Event()  # set and replaced at every change of the state below
        self._playing = False
        # Number of play() calls: a run() that has ended does not start again in the same round.
        self._round = 0
        self._retired: Counter[str] = Counter()  # counters of members that have ended

    @property
    def playing(self) -> bool:
        return self._playing

    @property
    def serving(self) -> list[Member]:
        """Members that hold the current version."""
        return [entry.member for entry in self._serving]

    @property
    def _serving(self) -> list[Entry]:
        return [entry for entry in self._entries.values() if entry.state == "serving"]

    def scale(self, wanted: int) -> None:
        """Start members up to `wanted`, or drain the last ones; returns at once."""
        self._wanted = wanted
        for index in range(wanted):
            if index not in self._keepers or self._keepers[index].done():
                self._keepers[index] = asyncio.create_task(self._keep(index), name=f"index {index}")
        self._wake()

    async def ready(self) -> None:
        """Wait until every wanted index has a serving member; raises the error that stops the run."""
        await self._until(lambda: len(self.serving) >= self._wanted)

    def roster(self) -> list[dict[str, Any]]:
        """Name, state, version and process of every member."""
        return [
            {"part": s.member.name, "state": s.state, "version": s.version}
            | ({} if s.where is None else asdict(s.where))
            for _, s in sorted(self._entries.items())
        ]

    async def publish(self, update: WeightUpdate) -> list[SyncReport]:
        """Sync every serving member to `update`, or lose it. WeightMismatch stops the run."""
        async with self._weights:
            self._version = update.version
            syncs = (entry.sync(update, self._limits.sync) for entry in self._serving)
            reports = await asyncio.gather(*syncs)
        return [report for report in reports if report is not None]

    async def hand_over(
        self, send: Callable[[Sequence[str]], Awaitable[list[SyncReport]]]
    ) -> list[SyncReport]:
        """Have serving members get the next version from `send`, which is called with their names.

        Raises what it raises; which members hold the version is then unknown.
        """
        async with self._weights:
            entries = self._serving
            for entry in entries:
                entry.loading = True
            try:
                reports = await send([entry.member.name for entry in entries])
            finally:
                for entry in entries:
                    entry.loading = False
            for entry, report in zip(entries, reports, strict=True):
                entry.version = self._version = report.version
        return reports

    async def sleep(self, level: SleepLevel) -> None:
        """Have the engine of every serving member give up its memory until the next version, or end the member."""
        limits = self._limits.sync, self._settings.drain_timeout_seconds
        await asyncio.gather(*(entry.sleep(level, *limits) for entry in self._serving if not entry.asleep))

    def lose_joining(self, why: str) -> None:
        """Lose every member that is starting or loading its first version."""
        for entry in self._entries.values():
            if entry.state in ("starting", "syncing"):
                entry.lose(PartLost(why))

    def play(self) -> None:
        """Start playing groups on all members, also on later ones."""
        self._playing = True
        self._round += 1
        self._wake()

    async def pause(self) -> None:
        """Stop playing on all members, with groups unfinished: the learner has gone back to a checkpoint."""
        self._playing = False
        limit = self._settings.drain_timeout_seconds
        await asyncio.gather(*(entry.stop(limit) for entry in self._serving))

    async def evaluate(
        self, tasks: Sequence[Task], name: str, plan: EvaluationPlan = ONCE
    ) -> list[EpisodeRow]:
        """Play the tasks by the plan with the current weights; tasks of a lost member move to others."""
        return await evaluate_on(tasks, name, plan, lambda: self.serving, self._lose, self.failed)

    async def counters(self) -> Row:
        """Sums of counters over all members, ended ones included (their last known values)."""
        limit = self._settings.heartbeat_timeout_seconds
        await asyncio.gather(*(entry.count(limit) for entry in self._serving))
        total: Counter[str] = Counter(self._retired)
        for entry in self._entries.values():
            total.update(entry.counters)
        return dict(total)

    async def close(self) -> None:
        """Close every member, and kill those that do not answer."""
        for task in self._keepers.values():
            task.cancel()
        await asyncio.gather(*self._keepers.values(), return_exceptions=True)
        await asyncio.gather(*(self._end(entry) for entry in self._entries.values()))
        self._entries.clear()
        if self.failed.done() and not self.failed.cancelled():
            self.failed.exception()  # retrieved: it was raised in every wait
        self.failed.cancel()

    async def _keep(self, index: int) -> None:
        for life in itertools.count():
            name = f"rollout-{index}" + (f".{life}" if life else "")
            entry = Entry(self._launch(name), asyncio.get_running_loop().create_future())
            self._entries[index] = entry
            try:
                await self._live(index, entry)
                await self._leave(index, entry)
                return
            except WeightMismatch as error:
                self._stop_run(error)
                return
            except Exception as error:  # any error of a member: its index continues
                if not await self._replace(index, entry, error):
                    return

    async def _live(self, index: int, entry: Entry) -> None:
        member = entry.member
        try:
            async with AsyncExitStack() as turn:
                await turn.enter_async_context(self._turn())
                entry.where = await entry.or_lost(
                    within(self._limits.start, member.start(), f"{member.name} (start)")
                )
                heart = asyncio.create_task(entry.watch(self._settings, self._limits.load))
                try:
                    await entry.or_lost(self._work(index, entry, turn))
                finally:
                    heart.cancel()
        except Exception as error:
            entry.lose(error)  # raised in other waits for this member too, such as a sync
            raise

    async def _work(self, index: int, entry: Entry, turn: AsyncExitStack) -> None:
        await self._admit(entry)
        await turn.aclose()
        played = 0

        def unwanted() -> bool:
            return index >= self._wanted

        def due() -> bool:
            return self._playing and self._round > played

        def idle() -> bool:
            return entry.run is None or entry.run.done()

        while not unwanted():
            await self._until(lambda: unwanted() or due())
            if not unwanted():
                played = self._round
                # run() ends when all groups are played or the fleet is paused.
                entry.run = asyncio.ensure_future(entry.member.run())
                await self._until(lambda: unwanted() or idle(), entry.run)
                if entry.run.done():
                    entry.run.result()

    async def _admit(self, entry: Entry) -> None:
        entry.state = "syncing"
        while True:
            async with self._lend() as update:
                report = await entry.load(update, self._limits.sync, "sync")
            async with self._weights:
                if report.version == self._version or self._version < 0:
                    self._version, entry.version = report.version, report.version
                    entry.state = "serving"
                    break
        self._wake()

    async def _replace(self, index: int, entry: Entry, error: Exception) -> bool:
        member, where = entry.member, entry.where
        entry.state = "lost"
        self._forget(entry)
        await self._quietly(member.kill(), member)
        entry.killed.set()
        groups = await self._reassign(member.name, brief(error))
        self._say(f"{member.name} is lost ({brief(error)}); {groups} groups are reassigned")
        if index >= self._wanted:
            del self._entries[index]
            self._left(member.name)
            return False
        if where is None and isinstance(error, PartLost) and self.serving:
            return True  # the cluster has no room yet: the run continues with the others
        try:
            self.budget.spend(f"rollout-{index}", where, error)
        except PartFailed as failure:
            self._stop_run(failure)
            return False
        return True

    async def _leave(self, index: int, entry: Entry) -> None:
        """Scale this index down: running turns finish, other work is reassigned."""
        member = entry.member
        entry.state = "leaving"
        await self._quietly(within(self._settings.drain_timeout_seconds, member.drain(), member.name), member)
        groups = await self._reassign(member.name, "")
        self._say(f"{member.name} has left; {groups} groups are reassigned")
        await self._end(entry)
        if self._entries.get(index) is entry:
            del self._entries[index]
            self._left(member.name)

    async def _end(self, entry: Entry) -> None:
        member = entry.member
        if entry.state in ("serving", "leaving"):
            await self._quietly(entry.recount(_LAST_COUNT_SECONDS), member)
            await self._quietly(
                within(self._settings.drain_timeout_seconds, member.close(), member.name), member
            )
        self._forget(entry)
        await self._quietly(member.kill(), member)

    def _forget(self, entry: Entry) -> None:
        self._retired.update(entry.counters)
        entry.counters = {}
        if entry.run is not None:
            entry.run.cancel()

    async def _quietly(self, ending: Awaitable[object], member: Member) -> None:
        # A member that is ended may be dead, frozen or half started; its errors do not stop the run.
        try:
            await ending
        except Exception as error:
            self._say(f"{member.name} did not end cleanly: {brief(error)}")

    def _lose(self, member: Member, error: BaseException) -> None:
        for entry in self._entries.values():
            if entry.member is member:
                entry.lose(error)

    def _stop_run(self, error: BaseException) -> None:
        if not self.failed.done():
            self.failed.set_exception(error)
        self._wake()

    async def _until(self, holds: Callable[[], bool], also: asyncio.Future[Any] | None = None) -> None:
        """Wait until a condition holds. also: rechecks it when done. Raises the error that stops the run."""
        while not holds():
            if self.failed.done():
                self.failed.result()
            change: asyncio.Future[Any] = asyncio.ensure_future(self._changed.wait())
            await asyncio.wait(
                [change, self.failed, *([also] if also else [])], return_when=asyncio.FIRST_COMPLETED
            )
            change.cancel()

    def _wake(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
