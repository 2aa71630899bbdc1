"""The replay buffer between rollout workers and the learner: the asyncio interface of a `ReplayStore`.

    worker:  reserve (waits for a free slot) -> plays, record_turns -> add (returns when the group is durable)
    learner: take (waits for P ready groups) -> trains, publishes -> release (wakes reserve)

Every call may be repeated: by a caller that has lost the answer, or after this process was killed and another one has
opened the same folder. Turns and groups that arrive together share one sync. Every wait has a limit or ends with
`close`.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Self, TypeVar

import pyarrow as pa

from rollout.buffer.ledger import EpisodeRow
from rollout.buffer.missing import missing
from rollout.buffer.new_groups import ALONE, Owner
from rollout.buffer.part_log import Fenced
from rollout.buffer.replay_store import BufferSettings, FinishedGroup, ReplayStore
from rollout.buffer.state_place import state_of
from rollout.wire.partition import WHOLE, Partition
from rollout.wire.trajectory import Assignment, DropReason, Slot, StaleSlot, Task

log = logging.getLogger(__name__)

T = TypeVar("T")

RETRY_INTERVAL_SECONDS = 1.0  # between two tries of a call while the disk is full


@dataclass(slots=True)
class _Pending:
    """Rows for the next commit, and the task that does it."""

    turns: list[pa.RecordBatch] = field(default_factory=list)
    finished: list[FinishedGroup] = field(default_factory=list)
    commit: asyncio.Task[list[StaleSlot | None]] | None = None


class _Signal:
    """Wakes all waiting tasks. Take `now` before reading the state, so that no change is missed."""

    def __init__(self) -> None:
        self.now = asyncio.Event()

    def wake(self) -> None:
        self.now.set()
        self.now = asyncio.Event()


class ReplayBuffer:
    """All calls come from one event loop; one thread works on the store, one call after another.

    clock: returns seconds, for how long a worker has held a slot. held: what `close` lets go of after the store.
    """

    def __init__(
        self,
        store: ReplayStore,
        clock: Callable[[], float] = time.monotonic,
        retry_interval_seconds: float = RETRY_INTERVAL_SECONDS,
        held: ExitStack | None = None,
    ) -> None:
        self._store = store
        self._held = held or ExitStack()
        self._fenced: Fenced | None = None
        self._clock = clock
        self._retry_interval_seconds = retry_interval_seconds
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="store")
        self._closed = False
        self._opened = clock()
        self._since: dict[int, tuple[int, float]] = {}  # by group id: its attempt, and when it was issued
        self._dropped: Counter[DropReason] = Counter()  # since the last release
        self._tickets: dict[tuple[str, int], object] = {}  # the newest `reserve` of each loop
        self._slots = _Signal()  # a slot may be free
        self._ready = _Signal()  # a step may be ready
        self._pending: _Pending | None = None
        self._committing = asyncio.Lock()  # while one commit runs, rows gather for the next
        self._paused: str | None = None
        self._paused_at = 0.0
        self._paused_seconds = 0.0  # of pauses that are over
        self._lacking = 0  # calls that retry because the disk is full

    @classmethod
    def over(
        cls,
        folder: Path,
        task_of: Callable[[int], Task],
        settings: BufferSettings,
        steps: int,
        seed: int,
        owner: Owner = ALONE,
        copy: str = "",
    ) -> Self:
        """Open the replay buffer of the run in `folder`. task_of: returns the task of a group id.

        copy: the base of the copy of its state (`state_place.copy_of`); empty: none. Raises LedgerError.
        """
        local = Path(settings.local_dir or tempfile.gettempdir())
        with ExitStack() as stack:
            state, copied = stack.enter_context(state_of(folder, copy, local))
            store = ReplayStore(
                state, task_of, settings, steps, seed=seed, owner=owner, copy=copied, run_folder=folder
            )
            return cls(store, held=stack.pop_all())

    async def reserve(self, worker: str, worker_loop: int) -> Assignment | None:
        """Return the next group to play; waits for a free slot. None: no more groups are needed, or from this worker.

        worker_loop: the caller among the worker's loops. One that holds a group gets the same assignment again.
        """
        ticket = self._tickets[worker, worker_loop] = object()
        # An abandoned call must not get a group: a newer call, or reassign, has replaced its ticket.
        while not self._closed and self._tickets.get((worker, worker_loop)) is ticket:
            if self._paused is not None:
                await asyncio.sleep(self._retry_interval_seconds)
                continue
            changed = self._slots.now
            assignment, over = await self._run(partial(self._reserve, worker, worker_loop))
            if assignment is not None:
                self._note(assignment.slot)
                return assignment
            if over:
                return None
            await changed.wait()
        return None

    async def record_turns(self, batch: pa.RecordBatch) -> None:
        """Store finished turns; returns when they are durable. Those of attempts without a lease are ignored."""
        await self._join_commit(lambda pending: pending.turns.append(batch))

    async def add(self, slot: Slot, batch: pa.RecordBatch, episodes: Sequence[EpisodeRow]) -> None:
        """Commit a group; returns when it is on disk and complete. Raises StaleSlot, and RuntimeError after `close`."""
        answers, count = await self._join_commit(
            lambda pending: pending.finished.append((slot, batch, episodes))
        )
        if (stale := answers[count - 1]) is not None:
            raise stale

    async def drop(
        self, slot: Slot, reason: DropReason, error: str = "", episodes: Sequence[EpisodeRow] = ()
    ) -> None:
        """Drop a group; its slot is free at once. Raises as `add` does."""
        self._require_open()
        await self._run(partial(self._store.drop, slot, reason, error, episodes))
        self._dropped[reason] += 1
        self._since.pop(slot.group_id, None)
        self._wake()

    async def reassign(self, worker: str, lost: str = "") -> int:
        """Let a worker's groups wait for other workers; returns how many there are. Its waiting calls return None.

        lost: the error by which the worker was lost; its groups are then suspected to be the cause.
        """
        self._require_open()
        for caller in [caller for caller in self._tickets if caller[0] == worker]:
            del self._tickets[caller]
        count = await self._run(partial(self._store.reassign, worker, lost))
        self._wake()
        return count

    async def take(self, version: int, timeout_s: float, share: Partition = WHOLE) -> list[pa.RecordBatch]:
        """Return the groups of the step after `version`, in order of group id; a repeated call returns the same.

        The groups it reuses follow; `decode` marks them. A rank of several gets its share, always the same one. Raises
        TimeoutError, which names what is missing and the workers that hold it (time with a full disk does not count);
        TooManyFailures; StepTorn; ValueError for a version that does not follow; RuntimeError after `close`.
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
                continue  # the limit may have moved: the disk was full meanwhile

    async def gather(self, version: int, timeout_s: float) -> None:
        """Wait as `take` does, without the groups: the learner takes them later, and gets these."""
        await self.take(version, timeout_s)

    async def discard(self, version: int, reason: DropReason) -> None:
        """Drop the groups that the step after `version` has taken and cannot train on; it may take others."""
        self._require_open()
        await self._run(partial(self._store.discard, version, reason))
        self._wake()

    async def release(self, version: int) -> None:
        """Engines hold `version`: free the slots of the last step."""
        self._require_open()
        await self._run(partial(self._store.release, version))
        self._dropped.clear()
        self._wake()

    async def checkpointed(self, version: int) -> None:
        """A checkpoint of `version` is on disk."""
        self._require_open()
        await self._run(partial(self._store.checkpointed, version))

    async def rollback(self, version: int, new_driver: bool = False) -> None:
        """The learner continues from the checkpoint of `version`; see `ReplayStore.rollback`.

        new_driver: its workers have the names of earlier ones, which cannot reach this process.
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
        """Balance of the ledger, see `Ledger.counts`."""
        self._require_open()
        return await self._run(self._store.counts)

    async def state(self) -> dict[str, Any]:
        """State for displays and watchdogs.

        version: of the engines' weights. ready: complete groups. held: groups being played. waiting: groups without a
        worker. paused: the reason, or None. missing: what a step waits for.
        """
        return await self._run(self._facts)

    def require_sole(self) -> None:
        """Raise Fenced if another replay buffer was found to have taken over this run."""
        if self._fenced is not None:
            raise self._fenced

    async def close(self) -> None:
        """End the run: `reserve` returns None from now on, and pending rows are committed."""
        if self._closed:
            return
        self._closed = True
        self._wake()
        while (pending := self._pending) is not None and pending.commit is not None:
            await asyncio.wait([pending.commit])
        async with self._committing:
            loop = asyncio.get_running_loop()
            try:
                await loop.run_in_executor(self._thread, self._store.close)
            except OSError as error:
                if (lack := self._store.disk_space.lack(error)) is None:
                    raise
                # All rows are stored; only the trailer of the last segment, or the last snapshot, is missing.
                log.warning("the replay buffer closes with less than it would store: %s", lack)
            finally:
                self._held.close()
        self._thread.shutdown(wait=False)

    # One call after another -------------------------------------------------------------------------------------------

    async def _run(self, call: Callable[[], T]) -> T:
        """Call this in the store's thread, and ship; while storage is full or away, pause the run and retry."""
        loop = asyncio.get_running_loop()
        lacks = False
        try:
            while True:
                try:
                    return await loop.run_in_executor(self._thread, self._shipped, call)
                except Fenced as error:
                    self._fenced = error
                    self._wake()
                    raise
                except (OSError, sqlite3.Error) as error:
                    lack = self._store.disk_space.lack(error)
                    if lack is None:
                        raise
                if not lacks:
                    lacks = True
                    self._pause(lack)
                self._require_open()
                await asyncio.sleep(self._retry_interval_seconds)
        finally:
            if lacks:
                self._go_on()

    def _shipped(self, call: Callable[[], T]) -> T:
        answer = call()
        self._store.ship()
        return answer

    def _pause(self, lack: str) -> None:
        if self._paused is None:
            log.warning("the run is paused: %s", lack)
            self._paused_at = asyncio.get_running_loop().time()
        self._paused = lack
        self._lacking += 1

    def _go_on(self) -> None:
        self._lacking -= 1
        if not self._lacking:
            log.warning("the run continues: what it writes has room again")
            self._paused_seconds += asyncio.get_running_loop().time() - self._paused_at
            self._paused = None

    def _pauses(self) -> float:
        """Seconds for which the disk was full, up to now."""
        now = asyncio.get_running_loop().time()
        return self._paused_seconds + (now - self._paused_at if self._paused is not None else 0.0)

    def _reserve(self, worker: str, worker_loop: int) -> tuple[Assignment | None, bool]:
        return self._store.reserve(worker, worker_loop), self._store.covered or self._store.is_evicted(worker)

    def _take(self, version: int, share: Partition) -> tuple[list[pa.RecordBatch] | None, bool]:
        """The step's groups, and whether waiting calls of `reserve` can get a group whose rows were lost."""
        batches = self._store.take(version, share)
        return batches, self._store.unassigned > 0

    def _note(self, slot: Slot) -> None:
        known = self._since.get(slot.group_id)
        if known is None or known[0] != slot.attempt:
            self._since[slot.group_id] = (slot.attempt, self._clock())

    async def _join_commit(self, put: Callable[[_Pending], None]) -> tuple[list[StaleSlot | None], int]:
        """Join the next commit. Returns its answers, and the number of groups in it up to the caller's."""
        self._require_open()
        pending = self._pending
        if pending is None:
            pending = self._pending = _Pending()
            pending.commit = asyncio.create_task(self._commit(), name="replay buffer commits")
        put(pending)
        count = len(pending.finished)
        assert pending.commit is not None
        # Other calls wait for the same commit: cancelling one of them must not cancel it.
        return await asyncio.shield(pending.commit), count

    async def _commit(self) -> list[StaleSlot | None]:
        async with self._committing:
            pending, self._pending = self._pending, None
            assert pending is not None
            waited_for = self._store.plays_alone and pending.finished
            answers = await self._run(partial(self._store.commit, pending.turns, pending.finished))
        for slot, *_ in pending.finished:
            self._since.pop(slot.group_id, None)
        if pending.finished:
            self._ready.wake()
        if waited_for:
            self._slots.wake()
        return answers

    def _wake(self) -> None:
        self._slots.wake()
        self._ready.wake()

    def _require_open(self) -> None:
        self.require_sole()
        if self._closed:
            raise RuntimeError(
                "the replay buffer is closed: the run has ended; resume it, and its groups are reissued"
            )

    def _facts(self) -> dict[str, Any]:
        store = self._store
        return {
            "version": store.version,
            "ready": store.ready,
            "held": len(store.leases),
            "waiting": store.unassigned,
            "paused": self._paused,
            "missing": self._missing(),
        }

    def _missing(self) -> str:
        now = self._clock()
        held = [
            (now - self._since.get(group_id, (0, self._opened))[1], group_id, worker)
            for group_id, worker in self._store.leases
        ]
        dropped = dict(self._dropped)  # a copy: the event loop may change it meanwhile
        return missing(self._store, held, dropped)
