"""The fleet: the rollout workers of a run, started, given the current weights, watched, replaced, grown and shrunk.

Plain asyncio over `Member`s; what a member is (a Ray actor, an object of this process) is the ring's to know.

    seat        a place for one worker; its members live there one after the other: rollout-1, rollout-1.1, rollout-1.2
    admitted    a member that holds the current version, proven by checksums and probe; only such members sample
    lost        it died, raised, or did not answer a heartbeat in time: it is killed, what it held is handed on to the
                others, and the seat starts its next member while its budget of restarts lasts

Publishing waits for every admitted member or for its loss, so a step never waits for the dead.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from deploy.cluster.evaluation_spread import spread
from deploy.cluster.member import Member
from deploy.config.supervise import Budget, PartFailed, PartLost, SupervisionSettings, brief, within
from rollout.buffer.replay_store import EpisodeRow
from rollout.wire.metrics import Row
from rollout.wire.process_info import ProcessInfo
from rollout.wire.trajectory import Task
from rollout.wire.weights import SyncReport, WeightMismatch, WeightUpdate

T = TypeVar("T")

_WHY_SECONDS = 2.0


@dataclass
class _Seated:
    """A member in its seat."""

    member: Member
    failed: asyncio.Future[None]
    where: ProcessInfo | None = None
    state: str = "starting"
    version: int = -1
    run: asyncio.Future[None] | None = None
    counters: Row = field(default_factory=dict)  # as last heard

    def lose(self, error: BaseException) -> None:
        if not self.failed.done():
            self.failed.set_exception(error)
            self.failed.exception()  # it may be that nobody is waiting for it


class Fleet:
    """All calls come from one event loop.

    `launch` makes a member by name; `lend` hands out the current version for as long as its block runs; `reassign`
    tells the replay buffer that a worker is gone, `lost` that it was lost, and by which error; `say` is told what a
    person should know. `failed` is a future that ends with the error that stops the run.
    """

    def __init__(
        self,
        launch: Callable[[str], Member],
        lend: Callable[[], AbstractAsyncContextManager[WeightUpdate]],
        reassign: Callable[[str], Awaitable[int]],
        settings: SupervisionSettings,
        start_seconds: float,
        sync_seconds: float,
        say: Callable[[str], None],
        budget: Budget | None = None,
        lost: Callable[[str, str], Awaitable[int]] | None = None,
    ) -> None:
        self._launch = launch
        self._lend = lend
        self._hand_on = reassign
        self._hand_on_lost = lost or (lambda worker, error: reassign(worker))
        self._settings = settings
        self._start_seconds = start_seconds
        self._sync_seconds = sync_seconds
        self._say = say
        self.budget = budget or Budget(settings)
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._seats: dict[int, asyncio.Task[None]] = {}
        self._seated: dict[int, _Seated] = {}
        self._wanted = 0
        self._version = -1
        self._weights = asyncio.Lock()  # a version does not advance while a member is being admitted to it
        self._changed = asyncio.Event()  # set, and replaced, whenever anything below changes
        self._playing = False
        self._round = (
            0  # how often play() was called: a run() that has ended is not begun again in the same round
        )
        self._retired: Counter[str] = Counter()  # counters of members that are gone

    # Size ---------------------------------------------------------------------------------------------------------

    @property
    def playing(self) -> bool:
        return self._playing

    @property
    def serving(self) -> list[Member]:
        """Members that hold the current version."""
        return [seated.member for seated in self._seated.values() if seated.state == "serving"]

    def scale(self, wanted: int) -> None:
        """Fill seats up to `wanted`, or have the last ones drain; returns at once."""
        self._wanted = wanted
        for seat in range(wanted):
            if seat not in self._seats or self._seats[seat].done():
                self._seats[seat] = asyncio.create_task(self._keep(seat), name=f"seat {seat}")
        self._wake()

    async def ready(self) -> None:
        """Wait until every wanted seat has a serving member; ends with the error that stops the run."""
        await self._until(lambda: len(self.serving) >= self._wanted)

    def roster(self) -> list[dict[str, Any]]:
        """Who sits where, for people and tools."""
        return [
            {"part": s.member.name, "state": s.state, "version": s.version}
            | ({} if s.where is None else asdict(s.where))
            for _, s in sorted(self._seated.items())
        ]

    # Work ---------------------------------------------------------------------------------------------------------

    async def publish(self, update: WeightUpdate) -> list[SyncReport]:
        """Every serving member holds `update` when this returns, or is lost. WeightMismatch stops the run."""
        async with self._weights:
            self._version = update.version
            members = [seated for seated in self._seated.values() if seated.state == "serving"]
            reports = await asyncio.gather(*(self._sync(seated, update) for seated in members))
        return [report for report in reports if report is not None]

    def play(self) -> None:
        """Have the members play groups, now and whenever one joins."""
        self._playing = True
        self._round += 1
        self._wake()

    async def pause(self) -> None:
        """Have all members leave their groups where they are: the learner has gone back to a checkpoint."""
        self._playing = False
        stopping = [s for s in self._seated.values() if s.state == "serving"]
        for seated, outcome in zip(
            stopping,
            await asyncio.gather(
                *(within(self._settings.drain_seconds, s.member.stop(), s.member.name) for s in stopping),
                return_exceptions=True,
            ),
            strict=True,
        ):
            if isinstance(outcome, BaseException):
                seated.lose(outcome)

    async def evaluate(self, tasks: Sequence[Task], name: str) -> list[EpisodeRow]:
        """One episode a task with the current weights; what a lost member was playing is played by another."""
        return await spread(tasks, name, lambda: self.serving, self._lose, self.failed)

    async def counters(self) -> Row:
        """Sums over all members, those that are gone included (as last heard)."""

        async def ask(seated: _Seated) -> None:
            try:
                told = within(self._settings.frozen_seconds, seated.member.counters(), seated.member.name)
                seated.counters = await told
            except Exception as error:
                seated.lose(await _explained(error, seated.member))

        await asyncio.gather(*(ask(s) for s in self._seated.values() if s.state == "serving"))
        total: Counter[str] = Counter(self._retired)
        for seated in self._seated.values():
            total.update(seated.counters)
        return dict(total)

    async def stacks(self) -> dict[str, str]:
        """What every member is doing; those that do not say are named so."""

        async def ask(member: Member) -> str:
            try:
                return await within(5.0, member.stacks(), member.name)
            except Exception as error:
                return brief(error)

        members = [seated.member for seated in self._seated.values()]
        told = await asyncio.gather(*(ask(member) for member in members))
        return {member.name: text for member, text in zip(members, told, strict=True)}

    async def close(self) -> None:
        """End every member in order, those that do not answer by force."""
        for task in self._seats.values():
            task.cancel()
        await asyncio.gather(*self._seats.values(), return_exceptions=True)
        await asyncio.gather(*(self._end(seated) for seated in self._seated.values()))
        self._seated.clear()
        if self.failed.done() and not self.failed.cancelled():
            self.failed.exception()  # it was told to whoever waited
        self.failed.cancel()

    # A seat's life ------------------------------------------------------------------------------------------------

    async def _keep(self, seat: int) -> None:
        for life in itertools.count():
            name = f"rollout-{seat}" + (f".{life}" if life else "")
            seated = _Seated(self._launch(name), asyncio.get_running_loop().create_future())
            self._seated[seat] = seated
            try:
                await self._live(seat, seated)
                await self._leave(seat, seated)
                return
            except WeightMismatch as error:
                self._stop_run(error)
                return
            except Exception as error:  # whatever a member dies of, the seat goes on
                if not await self._replace(seat, seated, error):
                    return

    async def _live(self, seat: int, seated: _Seated) -> None:
        member = seated.member
        try:
            seated.where = await self._or_lost(
                seated, within(self._start_seconds, member.start(), f"{member.name} (start)")
            )
            heart = asyncio.create_task(self._watch(seated))
            try:
                await self._or_lost(seated, self._work(seat, seated))
            finally:
                heart.cancel()
        except Exception as error:
            seated.lose(error)  # whoever else waits for this member (a sync) is told as well
            raise

    async def _work(self, seat: int, seated: _Seated) -> None:
        await self._admit(seated)
        played = 0

        def unwanted() -> bool:
            return seat >= self._wanted

        def due() -> bool:
            return self._playing and self._round > played

        def idle() -> bool:
            return seated.run is None or seated.run.done()

        while not unwanted():
            await self._until(lambda: unwanted() or due())
            if not unwanted():
                played = self._round
                # It ends when all groups are played, and when the fleet is paused.
                seated.run = asyncio.ensure_future(seated.member.run())
                await self._until(lambda: unwanted() or idle(), seated.run)
                if seated.run.done():
                    seated.run.result()

    async def _watch(self, seated: _Seated) -> None:
        settings, member = self._settings, seated.member
        while True:
            await asyncio.sleep(settings.heartbeat_seconds)
            try:
                await within(settings.frozen_seconds, member.ping(), f"{member.name} (heartbeat)")
            except Exception as error:
                seated.lose(await _explained(error, member))
                return

    async def _admit(self, seated: _Seated) -> None:
        seated.state = "syncing"
        while True:
            async with self._lend() as update:
                report = await within(
                    self._sync_seconds, seated.member.sync(update), f"{seated.member.name} (sync)"
                )
            async with self._weights:
                if report.version == self._version or self._version < 0:
                    self._version, seated.version = report.version, report.version
                    seated.state = "serving"
                    break
        self._wake()

    async def _sync(self, seated: _Seated, update: WeightUpdate) -> SyncReport | None:
        member = seated.member
        what = f"{member.name} (sync to version {update.version})"
        try:
            report = await self._or_lost(seated, within(self._sync_seconds, member.sync(update), what))
        except WeightMismatch:
            raise
        except Exception as error:
            seated.lose(error)
            seated.state = "lost"
            return None
        seated.version = report.version
        return report

    async def _replace(self, seat: int, seated: _Seated, error: Exception) -> bool:
        member, where = seated.member, seated.where
        seated.state = "lost"
        self._forget(seated)
        await self._quietly(member.kill(), member)
        groups = await self._hand_on_lost(member.name, brief(error))
        self._say(f"{member.name} is lost ({brief(error)}); {groups} groups are handed on")
        if seat >= self._wanted:
            del self._seated[seat]
            return False
        if where is None and isinstance(error, PartLost) and self.serving:
            return True  # the cluster has no room for it yet: the run goes on with those it has
        try:
            self.budget.spend(f"rollout-{seat}", where, error)
        except PartFailed as failure:
            self._stop_run(failure)
            return False
        return True

    async def _leave(self, seat: int, seated: _Seated) -> None:
        """The seat is wanted no more: running turns end, the rest is handed on."""
        member = seated.member
        seated.state = "leaving"
        await self._quietly(within(self._settings.drain_seconds, member.drain(), member.name), member)
        groups = await self._hand_on(member.name)
        self._say(f"{member.name} has left; {groups} groups are handed on")
        await self._end(seated)
        if self._seated.get(seat) is seated:
            del self._seated[seat]

    async def _end(self, seated: _Seated) -> None:
        member = seated.member
        if seated.state in ("serving", "leaving"):
            try:
                seated.counters = await within(2.0, member.counters(), member.name)
            except Exception as error:
                self._say(f"{member.name} at its end: {brief(error)}")
            await self._quietly(within(self._settings.drain_seconds, member.close(), member.name), member)
        self._forget(seated)
        await self._quietly(member.kill(), member)

    def _forget(self, seated: _Seated) -> None:
        self._retired.update(seated.counters)
        seated.counters = {}
        if seated.run is not None:
            seated.run.cancel()

    async def _quietly(self, ending: Awaitable[object], member: Member) -> None:
        # What is being ended may be dead, frozen or half-made: how it takes its end is no news that stops anything.
        try:
            await ending
        except Exception as error:
            self._say(f"{member.name} at its end: {brief(error)}")

    def _lose(self, member: Member, error: BaseException) -> None:
        for seated in self._seated.values():
            if seated.member is member:
                seated.lose(error)

    def _stop_run(self, error: BaseException) -> None:
        if not self.failed.done():
            self.failed.set_exception(error)
        self._wake()

    async def _or_lost(self, seated: _Seated, pending: Coroutine[Any, Any, T]) -> T:
        """The answer, or the error by which the member is lost meanwhile."""
        answer = asyncio.ensure_future(pending)
        try:
            awaited: set[asyncio.Future[Any]] = {answer, seated.failed}
            await asyncio.wait(awaited, return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                seated.failed.result()
            return answer.result()
        finally:
            answer.cancel()

    async def _until(self, holds: Callable[[], bool], also: asyncio.Future[Any] | None = None) -> None:
        """Wait until something holds; `also` wakes the wait, and so does the end of the run, which is raised."""
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


async def _explained(error: Exception, member: Member) -> Exception:
    """The error by which a member is lost; where it did not answer, with what its other threads say of it."""
    if not isinstance(error, PartLost):
        return error
    try:
        told = await within(_WHY_SECONDS, member.standing(), member.name)
    except Exception:  # whatever it died of, or is frozen by: the loss is told in any case
        told = "its other threads do not answer either: its process was stopped, or a call into C keeps the interpreter"
    return PartLost(f"{error}: {told or 'its event loop goes on, its engine does not answer'}")
