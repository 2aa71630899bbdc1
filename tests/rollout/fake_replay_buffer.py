"""A replay buffer in memory: a list of groups to play, a journal of turns, and who holds what."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import pyarrow as pa
import pyarrow.compute as pc

from rollout.buffer.replay_store import EpisodeRow
from rollout.wire.schema import JOURNAL_SCHEMA, decode
from rollout.wire.trajectory import Assignment, DropReason, Group, Slot, StaleSlot


class FakeReplayBuffer:
    """`ends`: an empty list ends the run; else whoever reserves then waits."""

    def __init__(self, slots: Sequence[Slot], ends: bool = True) -> None:
        self.slots = list(slots)
        self.ends = ends
        self.held: dict[tuple[str, int], Slot] = {}
        self.groups: dict[int, Group] = {}
        self.dropped: dict[int, tuple[DropReason, str, Sequence[EpisodeRow]]] = {}
        self.calls: list[pa.RecordBatch] = []  # of record_turns
        self.recorded = asyncio.Event()
        self.writers = 0

    async def reserve(self, worker: str, worker_loop: int) -> Assignment | None:
        if (worker, worker_loop) in self.held:
            raise AssertionError(
                f"worker_loop {worker_loop} asks again before it handed in {self.held[worker, worker_loop]}"
            )
        if not self.slots:
            if not self.ends:
                await asyncio.Event().wait()
            return None
        slot = self.held[worker, worker_loop] = self.slots.pop(0)
        return Assignment(slot, self.rows_of(slot.group_id))

    async def record_turns(self, batch: pa.RecordBatch) -> None:
        self.writers += 1
        assert self.writers == 1, "one call at a time"
        await asyncio.sleep(0)
        self.calls.append(batch)
        self.writers -= 1
        self.recorded.set()

    async def add(self, slot: Slot, batch: pa.RecordBatch, episodes: Sequence[EpisodeRow]) -> None:
        self._end(slot)
        self.groups[slot.group_id] = decode(batch)

    async def drop(
        self, slot: Slot, reason: DropReason, error: str = "", episodes: Sequence[EpisodeRow] = ()
    ) -> None:
        self._end(slot)
        self.dropped[slot.group_id] = (reason, error, episodes)

    def reassign(self) -> int:
        """All held groups wait for whoever reserves next."""
        handed = [replace(slot, attempt=slot.attempt + 1) for slot in self.held.values()]
        self.slots = sorted(handed, key=lambda slot: slot.group_id) + self.slots
        self.held.clear()
        return len(handed)

    def rows_of(self, group_id: int) -> pa.RecordBatch | None:
        table = pa.Table.from_batches(self.calls, JOURNAL_SCHEMA)
        rows = table.filter(pc.equal(table.column("group_id"), group_id)).combine_chunks()
        return rows.to_batches()[0] if rows.num_rows else None

    def turns(self) -> list[tuple[int, int, int]]:
        """(group, episode, turn) of every recorded row, in order."""
        return [
            key
            for batch in self.calls
            for key in zip(
                *(batch.column(c).to_pylist() for c in ("group_id", "episode", "turn")), strict=True
            )
        ]

    def _end(self, slot: Slot) -> None:
        loops = [worker_loop for worker_loop, held in self.held.items() if held == slot]
        if not loops:
            raise StaleSlot(f"group {slot.group_id} is not held by attempt {slot.attempt}")
        del self.held[loops[0]]
