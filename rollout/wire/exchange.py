"""The exchange: where rollout workers and the learner meet. The asyncio front of a `Store`.

    worker:  reserve (waits for a free slot) -> plays -> add (returns when the group is durable)
    learner: take (waits for P ready groups) -> trains, publishes -> release (wakes reserve)

Groups that finish together share one fsync. Every wait has a limit or ends with `close`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

import pyarrow as pa

from rollout.wire.ledger import EpisodeRow
from rollout.wire.segments import Location
from rollout.wire.store import Store
from rollout.wire.trajectory import DropReason, Slot

_Finished = tuple[Slot, pa.RecordBatch, Location, Sequence[EpisodeRow]]


class Exchange:
    """All calls come from one event loop."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._changed = asyncio.Condition()
        self._closed = False
        self._holders: dict[int, tuple[str, float]] = {}  # group id -> (worker, since when)
        self._appended: list[_Finished] = []
        self._waiters: list[asyncio.Future[None]] = []
        self._committer: asyncio.Task[None] | None = None
        self._writing = asyncio.Lock()  # one writer at a time: an append never runs beside an fsync

    async def reserve(self, worker: str) -> Slot | None:
        """The next group to play; waits for a free slot. None: the run needs no more groups."""
        async with self._changed:
            while not (self._closed or self._store.covered):
                slot = self._store.reserve(worker)
                if slot is not None:
                    self._holders[slot.group_id] = (worker, time.monotonic())
                    return slot
                await self._changed.wait()
        return None

    async def add(self, slot: Slot, batch: pa.RecordBatch, episodes: Sequence[EpisodeRow]) -> None:
        """Hand in a group; returns when it is durable and complete."""
        async with self._writing:
            location = self._store.append(slot, batch)
        committed = asyncio.get_running_loop().create_future()
        self._appended.append((slot, batch, location, episodes))
        self._waiters.append(committed)
        if self._committer is None or self._committer.done():
            self._committer = asyncio.create_task(self._commit_appended())
        await asyncio.wait({committed, self._committer}, return_when=asyncio.FIRST_COMPLETED)
        if not committed.done():
            self._committer.result()  # raises what went wrong with the disk or the ledger

    async def drop(
        self, slot: Slot, reason: DropReason, error: str = "", episodes: Sequence[EpisodeRow] = ()
    ) -> None:
        """Give a group up; its slot is free at once."""
        async with self._writing:
            self._store.drop(slot, reason, error, episodes)
        self._holders.pop(slot.group_id, None)
        await self._wake()

    async def take(self, timeout_s: float) -> list[pa.RecordBatch]:
        """The next step's groups; TimeoutError says what is missing and who holds it."""
        try:
            async with asyncio.timeout(timeout_s), self._changed:
                while (batches := self._store.take()) is None:
                    await self._changed.wait()
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

    async def archive(self, name: str, batches: Sequence[pa.RecordBatch]) -> None:
        """Store rows that are not trained on."""
        self._store.archive(name, batches)

    async def counts(self) -> dict[str, int]:
        """The ledger's balance."""
        return self._store.counts()

    async def close(self) -> None:
        """End the run: reserve answers None from now on, and what is appended is committed."""
        self._closed = True
        await self._wake()
        if self._committer is not None:
            await asyncio.wait([self._committer])
        self._store.close()

    async def _commit_appended(self) -> None:
        # What is appended during an fsync waits for the next one: under load, many groups share one.
        while self._appended:
            async with self._writing:
                finished, waiters = self._appended, self._waiters
                self._appended, self._waiters = [], []
                await asyncio.to_thread(self._store.sync)
                self._store.commit(finished)
            for slot, *_ in finished:
                self._holders.pop(slot.group_id, None)
            for waiter in waiters:
                waiter.set_result(None)
            await self._wake()

    async def _wake(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    def _missing(self) -> str:
        now = time.monotonic()
        held = [f"{worker} holds group {group} for {now - since:.0f} s" for group, (worker, since) in self._holders.items()]
        return f"{self._store.ready} groups are ready, {len(held)} are being played" + (f" ({'; '.join(held[:4])})" if held else "")
