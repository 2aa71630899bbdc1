"""Makes finished turns durable while their group is being played, so that the loss of a worker costs none of them.

    every turn      one row is appended to a list, without encoding
    every flush     all rows of groups that are not committed go to the replay buffer in one call

A group that is committed before the next flush needs no record of its turns.
"""

from __future__ import annotations

import asyncio
from typing import Protocol

import pyarrow as pa

from rollout.wire.schema import TurnRow, encode_turns
from rollout.wire.trajectory import Slot, Turn, TurnEnd

FLUSH_INTERVAL_SECONDS = 0.45  # a turn reaches the replay buffer within half a second of its end


class TurnSink(Protocol):
    """The part of the replay buffer that the recorder uses."""

    async def record_turns(self, batch: pa.RecordBatch) -> None: ...


class Recorder:
    """Turns of one worker. `run` sends them until `finish`; an error of the replay buffer ends it."""

    def __init__(self, replay_buffer: TurnSink, worker: str) -> None:
        self._replay_buffer = replay_buffer
        self._worker = worker
        self._pending: dict[tuple[int, int], list[TurnRow]] = {}  # by group and attempt
        self._finishing = asyncio.Event()
        self._lag = 0.0

    def note(self, slot: Slot, episode: int, turn: Turn, end: TurnEnd | None, snapshot: bytes | None) -> None:
        """Keep a finished turn for the next flush."""
        group = slot.group_id, slot.attempt
        rows = self._pending.get(group)
        if rows is None:
            rows = self._pending[group] = []
        rows.append((slot, episode, turn, end, snapshot))

    def forget(self, slot: Slot) -> None:
        """Discard the turns of a group that is committed, or is not this worker's any more."""
        self._pending.pop((slot.group_id, slot.attempt), None)

    async def run(self) -> None:
        """Send the turns at every interval, one call at a time; after `finish`, send once more and return."""
        loop = asyncio.get_running_loop()
        try:
            while not self._finishing.is_set():
                due = loop.time() + FLUSH_INTERVAL_SECONDS
                try:
                    async with asyncio.timeout_at(due):
                        await self._finishing.wait()
                except TimeoutError:
                    self._lag = max(self._lag, loop.time() - due)
                await self._flush()
        finally:
            self._finishing.clear()

    def finish(self) -> None:
        """Let `run` send the remaining turns and return; no turn follows."""
        self._finishing.set()

    def loop_lag(self) -> float:
        """Largest delay of a flush since the last call, seconds: for how long the event loop was blocked."""
        lag, self._lag = self._lag, 0.0
        return lag

    async def _flush(self) -> None:
        pending, self._pending = self._pending, {}
        rows = [row for rows in pending.values() for row in rows]
        if rows:
            await self._replay_buffer.record_turns(encode_turns(rows, self._worker))
