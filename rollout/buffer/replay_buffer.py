"""The replay buffer: where rollout workers and the learner meet. The asyncio front of a `ReplayStore`.

    worker:  reserve (waits for a free slot) -> plays, record_turns -> add (returns when the group is durable)
    learner: take (waits for P ready groups) -> trains, publishes -> release (wakes reserve)

Every call may be repeated: by a caller whose answer was lost, or after this process was killed and another one has
opened the same folder. Turns and groups that arrive together share one sync. Every wait has a limit or ends with
`close`.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Self, TypeVar

import pyarrow as pa

from rollout.buffer.ledger import EpisodeRow
from rollout.buffer.replay_store import BufferSettings, Finished, ReplayStore
from rollout.wire.partition import WHOLE, Partition
from rollout.wire.trajectory import Assignment, DropReason, Slot, StaleSlot, Task

log = logging.getLogger(__name__)

T = TypeVar("T")

RETRY_SECONDS = 1.0  # between two looks at a disk without room
_NAMED = 4  # holders that a message names


@dataclass(slots=True)
class _Gathered:
    """What waits for the next sync, and the task that does it."""

    turns: list[pa.RecordBatch] = field(default_factory=list)
    finished: list[Finished] = field(default_factory=list)
    commit: asyncio.Task[list[StaleSlot | None]] | None = None


class _Signal:
    """Wakes everyone who waits. Take `now` before looking at what may change, so that no change is missed."""

    def __init__(self) -> None:
        self.now = asyncio.Event()

    def wake(self) -> None:
        self.now.set()
        self.now = asyncio.Event()


class ReplayBuffer:
    """All calls come from one event loop, and all work on the store is done by one thread, one call after another.

    `clock` counts seconds; it tells how long a worker has held a slot.
    """

    def __init__(
        self,
        store: ReplayStore,
        clock: Callable[[], float] = time.monotonic,
        retry_seconds: float = RETRY_SECONDS,
    ) -> None:
        self._store = store
        self._clock = clock
        self._retry_seconds = retry_seconds
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="store")
        self._closed = False
        self._opened = clock()
        self._since: dict[int, tuple[int, float]] = {}  # by group id: its attempt, and when it was given out
        self._dropped: Counter[DropReason] = Counter()  # since the last release
        self._asking: dict[tuple[str, int], object] = {}  # the newest `reserve` of each loop
        self._slots = _Signal()  # a slot may be free
        self._ready = _Signal()  # a step may be ready
        self._gathered: _Gathered | None = None
        self._committing = asyncio.Lock()  # while one sync runs, the next one gathers
        self._paused: str | None = None
        self._paused_at = 0.0
        self._paused_seconds = 0.0  # of pauses that are over
        self._lacking = 0  # calls that found no room and try again

    @classmethod
    def over(
        cls, folder: Path, task_of: Callable[[int], Task], settings: BufferSettings, steps: int, seed: int
    ) -> Self:
        """The replay buffer of the run in `folder`, of so many steps; `task_of` says a group's task."""
        return cls(ReplayStore(folder, task_of, settings, total_steps=steps, seed=seed))

    async def reserve(self, worker: str, lane: int) -> Assignment | None:
        """The next group to play; waits for a free slot. None: the run needs no more groups, or not from this caller.

        lane: which of the worker's loops asks. One that holds a group and asks again gets the same assignment.
        """
        ticket = self._asking[worker, lane] = object()
        # A call that nobody waits for any more must not be given a group: a newer one, or reassign, has ended it.
        while not self._closed and self._asking.get((worker, lane)) is ticket:
            if self._paused is not None:
                await asyncio.sleep(self._retry_seconds)
                continue
            changed = self._slots.now
            assignment, over = await self._run(partial(self._reserve, worker, lane))
            if assignment is not None:
                self._note(assignment.slot)
                return assignment
            if over:
                return None
            await changed.wait()
        return None

    async def record_turns(self, batch: pa.RecordBatch) -> None:
        """Keep finished turns of unfinished groups; returns when they are durable.

        Rows of groups and attempts that are not held are ignored.
        """
        await self._hand_in(lambda gathered: gathered.turns.append(batch))

    async def add(self, slot: Slot, batch: pa.RecordBatch, episodes: Sequence[EpisodeRow]) -> None:
        """Hand in a group; returns when it is on disk and complete. Raises StaleSlot, RuntimeError after `close`."""
        answers, place = await self._hand_in(
            lambda gathered: gathered.finished.append((slot, batch, episodes))
        )
        if (stale := answers[place - 1]) is not None:
            raise stale

    async def drop(
        self, slot: Slot, reason: DropReason, error: str = "", episodes: Sequence[EpisodeRow] = ()
    ) -> None:
        """Give a group up; its slot is free at once. Raises as `add` does."""
        self._require_open()
        await self._run(partial(self._store.drop, slot, reason, error, episodes))
        self._dropped[reason] += 1
        self._since.pop(slot.group_id, None)
        self._wake()

    async def reassign(self, worker: str, lost: str = "") -> int:
        """What this worker holds waits for others; returns how many groups. Its waiting calls are answered None.

        lost: the error by which it did not leave in order; the groups it held are under suspicion.
        """
        self._require_open()
        for asking in [asking for asking in self._asking if asking[0] == worker]:
            del self._asking[asking]
        count = await self._run(partial(self._store.reassign, worker, lost))
        self._wake()
        return count

    async def take(self, version: int, timeout_s: float, share: Partition = WHOLE) -> list[pa.RecordBatch]:
        """The groups of the step after `version`, in order of group id; the same step asked again gets the same.

        Behind them come those it reuses; decode tells them apart. A rank of several gets its share, always the same
        one. Raises TimeoutError, which says what is missing and who holds it (while the disk has no room, the time
        stands still); TooManyFailures; StepTorn; ValueError for a version that does not follow; RuntimeError after
        `close`.
        """
        clock = asyncio.get_running_loop().time
        limit = clock() + timeout_s - self._pauses()
        while True:
            self._require_open()
            changed = self._ready.now
            batches, for_workers = await self._run(partial(self._take, version, share))
            if for_workers:
                self._slots.wake()
            if batches is not None:
                return batches
            left = limit + self._pauses() - clock()
            if left <= 0:
                raise TimeoutError(f"no batch within {timeout_s:g} s: {await self._run(self._missing)}")
            try:
                async with asyncio.timeout(left):
                    await changed.wait()
            except TimeoutError:
                continue  # or the disk had no room meanwhile

    async def discard(self, version: int, reason: DropReason) -> None:
        """The step after `version` can not be made of the groups it took: drop them, and let it take others."""
        self._require_open()
        await self._run(partial(self._store.discard, version, reason))
        self._wake()

    async def release(self, version: int) -> None:
        """Engines hold `version`; the slots of the last step are free."""
        self._require_open()
        await self._run(partial(self._store.release, version))
        self._dropped.clear()
        self._wake()

    async def checkpointed(self, version: int) -> None:
        """A checkpoint of `version` is on disk."""
        self._require_open()
        await self._run(partial(self._store.checkpointed, version))

    async def rollback(self, version: int, new_driver: bool = False) -> None:
        """The learner goes on from the checkpoint of `version`, and everything else with it.

        A new driver gives its workers the names of those before, who can not reach this process.
        """
        self._require_open()
        await self._run(partial(self._store.rollback, version, new_driver))
        self._since.clear()
        self._wake()

    async def archive(self, name: str, batches: Sequence[pa.RecordBatch]) -> None:
        """Store rows that are not trained on."""
        self._require_open()
        await self._run(partial(self._store.archive, name, batches))

    async def counts(self) -> dict[str, int]:
        """The ledger's balance."""
        self._require_open()
        return await self._run(self._store.counts)

    async def state(self) -> dict[str, Any]:
        """For displays and watchdogs, in the order of the keys.

        Weight version of the engines; complete groups; groups being played; groups due to be given out once more; why
        the run is paused (None: it is not); what a step waits for.
        """
        return await self._run(self._facts)

    async def close(self) -> None:
        """End the run: reserve answers None from now on, and what is handed in is committed."""
        if self._closed:
            return
        self._closed = True
        self._wake()
        while (gathered := self._gathered) is not None and gathered.commit is not None:
            await asyncio.wait([gathered.commit])
        async with self._committing:
            loop = asyncio.get_running_loop()
            try:
                await loop.run_in_executor(self._thread, self._store.close)
            except OSError as error:
                if self._store.room.lack(error) is None:
                    raise
                # All that counts is on disk: only the mark that ends the last segment is not.
        self._thread.shutdown(wait=False)

    # One call after another -------------------------------------------------------------------------------------------

    async def _run(self, call: Callable[[], T]) -> T:
        """Do this in the store's thread; where the disk has no room, pause the run and do it again until it has."""
        loop = asyncio.get_running_loop()
        lacks = False
        try:
            while True:
                try:
                    return await loop.run_in_executor(self._thread, call)
                except (OSError, sqlite3.Error) as error:
                    lack = self._store.room.lack(error)
                    if lack is None:
                        raise
                if not lacks:
                    lacks = True
                    self._pause(lack)
                self._require_open()
                await asyncio.sleep(self._retry_seconds)
        finally:
            if lacks:
                self._go_on()

    def _pause(self, lack: str) -> None:
        if self._paused is None:
            log.warning("the run waits: %s", lack)
            self._paused_at = asyncio.get_running_loop().time()
        self._paused = lack
        self._lacking += 1

    def _go_on(self) -> None:
        self._lacking -= 1
        if not self._lacking:
            log.warning("the run goes on: there is room again")
            self._paused_seconds += asyncio.get_running_loop().time() - self._paused_at
            self._paused = None

    def _pauses(self) -> float:
        """Seconds for which the disk had no room, until now."""
        now = asyncio.get_running_loop().time()
        return self._paused_seconds + (now - self._paused_at if self._paused is not None else 0.0)

    def _reserve(self, worker: str, lane: int) -> tuple[Assignment | None, bool]:
        return self._store.reserve(worker, lane), self._store.covered or self._store.is_gone(worker)

    def _take(self, version: int, share: Partition) -> tuple[list[pa.RecordBatch] | None, bool]:
        """The step's groups, and whether that is news for those who wait in `reserve`: lost rows are issued again."""
        batches = self._store.take(version, share)
        return batches, self._store.unassigned > 0

    def _note(self, slot: Slot) -> None:
        known = self._since.get(slot.group_id)
        if known is None or known[0] != slot.attempt:
            self._since[slot.group_id] = (slot.attempt, self._clock())

    async def _hand_in(self, put: Callable[[_Gathered], None]) -> tuple[list[StaleSlot | None], int]:
        """Join the next sync. Returns its answers, and how many groups stood there with the caller's."""
        self._require_open()
        gathered = self._gathered
        if gathered is None:
            gathered = self._gathered = _Gathered()
            gathered.commit = asyncio.create_task(self._commit(), name="replay buffer commits")
        put(gathered)
        place = len(gathered.finished)
        assert gathered.commit is not None
        # Others wait for the same commit: one of them being cancelled must not cancel it.
        return await asyncio.shield(gathered.commit), place

    async def _commit(self) -> list[StaleSlot | None]:
        async with self._committing:
            gathered, self._gathered = self._gathered, None
            assert gathered is not None
            waited_for = self._store.plays_alone and gathered.finished
            answers = await self._run(partial(self._store.commit, gathered.turns, gathered.finished))
        for slot, *_ in gathered.finished:
            self._since.pop(slot.group_id, None)
        if gathered.finished:
            self._ready.wake()
        if waited_for:
            self._slots.wake()
        return answers

    def _wake(self) -> None:
        self._slots.wake()
        self._ready.wake()

    def _require_open(self) -> None:
        if self._closed:
            raise RuntimeError(
                "the replay buffer is closed: the run has ended, and a resumed one issues its groups again"
            )

    def _facts(self) -> dict[str, Any]:
        store = self._store
        return {
            "version": store.version,
            "ready": store.ready,
            "held": len(store.holders),
            "waiting": store.unassigned,
            "paused": self._paused,
            "missing": self._missing(),
        }

    def _missing(self) -> str:
        store, now = self._store, self._clock()
        held = sorted(
            (self._since.get(group_id, (0, self._opened))[1], group_id, worker)
            for group_id, worker in store.holders
        )
        parts = [
            f"{store.ready} groups are complete and a step needs {store.settings.groups_per_step}",
            f"{len(held)} are in flight",
        ]
        if store.unassigned:
            parts.append(f"{store.unassigned} wait for a worker")
        if store.in_step:
            parts.append(f"{store.in_step} are held by a step that was not released")
        dropped = dict(self._dropped)  # which the event loop may change meanwhile
        parts += [f"{count} groups were dropped as {reason.value}" for reason, count in dropped.items()]
        parts += [
            f"{worker} holds group {group} for {now - since:.0f} s" for since, group, worker in held[:_NAMED]
        ]
        if len(held) > _NAMED:
            parts.append(f"{len(held) - _NAMED} more are held for less")
        return "; ".join(parts)
