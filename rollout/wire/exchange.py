"""The exchange: where rollout workers and the learner meet. The asyncio front of a `Store`.

    worker:  reserve (waits for a free slot) -> plays -> add (returns when the group is durable)
    learner: take (waits for P ready groups) -> trains, publishes -> release (wakes reserve)

Groups that finish together share one fsync. Every wait has a limit or ends with `close`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pyarrow as pa

from rollout.wire.ledger import EpisodeRow
from rollout.wire.store import Finished, Store
from rollout.wire.trajectory import DropReason, Slot

_NAMED = 4  # holders that a message names


@dataclass(frozen=True, slots=True)
class _Holder:
    worker: str
    since: float  # seconds on the exchange's clock


class Exchange:
    """All calls come from one event loop. `clock` counts seconds and tells how long a worker has held a slot."""

    def __init__(self, store: Store, clock: Callable[[], float] = time.monotonic) -> None:
        self._store = store
        self._clock = clock
        self._changed = asyncio.Condition()
        self._closed = False
        self._holders: dict[int, _Holder] = {}  # by group id
        self._writing = (
            asyncio.Lock()
        )  # the segments have one user at a time: an append never runs beside an fsync
        self._appended: list[Finished] = []  # waits for the next commit
        self._commit: asyncio.Task[None] | None = None  # that next commit, where one is due

    async def reserve(self, worker: str) -> Slot | None:
        """The next group to play; waits for a free slot. None: the run needs no more groups."""
        async with self._changed:
            while not (self._closed or self._store.covered):
                slot = self._store.reserve(worker)
                if slot is not None:
                    self._holders[slot.group_id] = _Holder(worker, self._clock())
                    return slot
                await self._changed.wait()
        return None

    async def add(self, slot: Slot, batch: pa.RecordBatch, episodes: Sequence[EpisodeRow]) -> None:
        """Hand in a group; returns when it is on disk and complete.

        Raises ValueError where the slot is not held any more, RuntimeError after `close`.
        """
        async with self._writing:
            self._require_open()
            location = self._store.append(slot, batch)
            self._appended.append((slot, batch, location, episodes))
            if self._commit is None:
                self._commit = asyncio.create_task(self._commit_appended())
            commit = self._commit
        # Others wait for the same commit: one of them being cancelled must not cancel it.
        await asyncio.shield(commit)

    async def drop(
        self, slot: Slot, reason: DropReason, error: str = "", episodes: Sequence[EpisodeRow] = ()
    ) -> None:
        """Give a group up; its slot is free at once. Raises as `add` does."""
        self._require_open()
        self._store.drop(slot, reason, error, episodes)
        self._holders.pop(slot.group_id)
        await self._wake()

    async def take(self, timeout_s: float) -> list[pa.RecordBatch]:
        """The next step's groups in order of group id.

        Raises TimeoutError, which says what is missing and who holds it; TooManyFailures; RuntimeError after `close`.
        """
        try:
            async with asyncio.timeout(timeout_s), self._changed:
                self._require_open()
                while (batches := self._store.take()) is None:
                    await self._changed.wait()
                    self._require_open()
                return batches
        except TimeoutError:
            raise TimeoutError(f"no batch within {timeout_s:g} s: {self._missing()}") from None

    async def release(self, version: int) -> None:
        """Engines hold `version`; the slots of the last step are free."""
        self._store.release(version)
        await self._wake()

    async def landed(self, version: int) -> None:
        """A checkpoint of `version` is on disk."""
        self._store.landed(version)

    async def recover(self, version: int) -> None:
        """Go on from the checkpoint of `version`; before anything is reserved."""
        self._store.recover(version)
        await self._wake()

    async def archive(self, name: str, batches: Sequence[pa.RecordBatch]) -> None:
        """Store rows that are not trained on."""
        self._store.archive(name, batches)

    async def counts(self) -> dict[str, int]:
        """The ledger's balance."""
        return self._store.counts()

    async def close(self) -> None:
        """End the run: reserve answers None from now on, and what is handed in is committed."""
        self._closed = True
        await self._wake()
        if self._commit is not None:
            await asyncio.wait([self._commit])
        async with self._writing:
            self._store.close()

    async def _commit_appended(self) -> None:
        async with self._writing:
            # Whoever appends from here on needs another commit.
            finished, self._appended, self._commit = self._appended, [], None
            await asyncio.to_thread(self._store.sync)
            self._store.commit(finished)
        for slot, *_ in finished:
            self._holders.pop(slot.group_id)
        await self._wake()

    async def _wake(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    def _require_open(self) -> None:
        if self._closed:
            raise RuntimeError(
                "the exchange is closed: the run has ended, and a resumed one issues its groups again"
            )

    def _missing(self) -> str:
        store, now = self._store, self._clock()
        held = sorted(self._holders.items(), key=lambda item: item[1].since)
        taken = store.outstanding - store.ready - len(held)
        parts = [
            f"{store.ready} groups are complete and a step needs {store.settings.groups_per_step}",
            f"{len(held)} are in flight",
        ]
        if taken:
            parts.append(f"{taken} are held by a step that was not released")
        parts += [
            f"{holder.worker} holds group {group} for {now - holder.since:.0f} s"
            for group, holder in held[:_NAMED]
        ]
        if len(held) > _NAMED:
            parts.append(f"{len(held) - _NAMED} more are held for less")
        return "; ".join(parts)
