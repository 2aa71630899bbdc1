"""Where the rows of a group lie that a step may take, fresh or once more."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from rollout.buffer.segments import Location, read_batch
from rollout.wire.schema import as_reused
from rollout.wire.trajectory import Slot


@dataclass(slots=True)
class Complete:
    """A complete group: where its rows lie, and the rows themselves as long as they are at hand."""

    slot: Slot
    location: Location
    batch: pa.RecordBatch | None

    def read(self, folder: Path) -> pa.RecordBatch:
        """The rows. Raises CorruptSegment."""
        return self.batch or read_batch(folder, self.location)


@dataclass(frozen=True, slots=True)
class Reused:
    """A group that an earlier step was trained on."""

    group_id: int
    reuse: int  # which reuse of it this is, from 1 on
    location: Location

    def read(self, folder: Path) -> pa.RecordBatch:
        """The rows, which say that they are reused. Raises CorruptSegment."""
        return as_reused(read_batch(folder, self.location), self.reuse)
