"""Makes finished turns durable while their group is still being played, so that a lost worker costs none of them.

    every turn      one row is put on a list: nothing is encoded, no task is made
    every tick      all rows of groups that were not handed in meanwhile go to the replay buffer in one call

A group that is handed in before the next tick needs no record of its turns.
"""

from __future__ import annotations

import asyncio
from typing import Protocol

import pyarrow as pa

from rollout.wire.schema import encode_turns
from rollout.wire.trajectory import Slot, Step, TurnEnd

TICK_SECONDS = 0.45  # a turn goes to the replay buffer within half a second of its end

_Row = tuple[Slot, int, Step, TurnEnd | None, bytes | None]


class TurnSink(Protocol):
    """What the recorder needs of the replay buffer."""

    async def record_turns(self, batch: pa.RecordBatch) -> None: ...


class Recorder:
    """The turns of one worker. `run` hands them on until `finish`; an error of the replay buffer ends it."""

    def __init__(self, replay_buffer: TurnSink, worker: str) -> None:
        self._replay_buffer = replay_buffer
        self._worker = worker
        self._pending: dict[tuple[int, int], list[_Row]] = {}  # by group and attempt
        self._finishing = asyncio.Event()
        self._lag = 0.0

    def note(self, slot: Slot, episode: int, step: Step, end: TurnEnd | None, snapshot: bytes | None) -> None:
        """Keep a finished turn for the next tick."""
        group = slot.group_id, slot.attempt
        rows = self._pending.get(group)
        if rows is None:
            rows = self._pending[group] = []
        rows.append((slot, episode, step, end, snapshot))

    def forget(self, slot: Slot) -> None:
        """The group is handed in, and its rows say all that its turns would; or it is not this worker's any more."""
        self._pending.pop((slot.group_id, slot.attempt), None)

    async def run(self) -> None:
        """Hand the turns on, one call at a time, at every tick; once more after `finish`, and return."""
        loop = asyncio.get_running_loop()
        try:
            while not self._finishing.is_set():
                due = loop.time() + TICK_SECONDS
                try:
                    async with asyncio.timeout_at(due):
                        await self._finishing.wait()
                except TimeoutError:
                    self._lag = max(self._lag, loop.time() - due)
                await self._flush()
        finally:
            self._finishing.clear()

    def finish(self) -> None:
        """Nothing more is noted: let `run` hand on what there is and return."""
        self._finishing.set()

    def loop_lag(self) -> float:
        """Seconds by which the latest tick since the last question was late: how long the event loop was held up."""
        lag, self._lag = self._lag, 0.0
        return lag

    async def _flush(self) -> None:
        pending, self._pending = self._pending, {}
        rows = [row for rows in pending.values() for row in rows]
        if rows:
            await self._replay_buffer.record_turns(encode_turns(rows, self._worker))
