"""What a finished run has trained on, step by step: read from its ledger and segments, which stay as they are."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pyarrow as pa

from rollout.buffer.ledger_checks import check_log, examine, naming
from rollout.buffer.payload import Reused
from rollout.buffer.reuse import OF_STEPS
from rollout.buffer.segments import Location, read_batch
from rollout.wire.partition import WHOLE, Partition
from rollout.wire.trajectory import DropReason

_STEPS = """
SELECT taken_version, segment, "offset", length, checksum FROM groups WHERE state = 'trained'
ORDER BY taken_version, group_id
"""


class HistoryError(ValueError):
    """A run's past can not be learned from again; the message says why."""


class History:
    """A source of groups for a learner: what another learner took, at the same steps."""

    def __init__(self, run: Path) -> None:
        ledger = run / "ledger.sqlite"
        if not ledger.is_file():
            raise HistoryError(f"{run}: no ledger.sqlite, so this is no run folder")
        check_log(ledger)
        uri = f"{ledger.absolute().as_uri()}?mode=ro"
        with naming(ledger), closing(sqlite3.connect(uri, uri=True)) as db:
            examine(db, ledger)
            rows = db.execute(_STEPS).fetchall()
            known = db.execute("SELECT 1 FROM sqlite_master WHERE name = 'reuses'").fetchone()
            again = db.execute(OF_STEPS).fetchall() if known else []
        self._groups = run / "groups"
        self._steps: list[list[Location]] = []
        for version, *place in rows:
            if version == len(self._steps):
                self._steps.append([])
            self._steps[-1].append(Location(*place))
        self._reused: list[list[Reused]] = [[] for _ in self._steps]
        for version, group_id, *place, nth in again:
            if version < len(self._steps):
                self._reused[version].append(Reused(group_id, nth, Location(*place)))

    @property
    def steps(self) -> int:
        """Learner steps the run has made."""
        return len(self._steps)

    async def take(self, version: int, timeout_s: float, share: Partition = WHOLE) -> list[pa.RecordBatch]:
        """The groups of the step after `version`. Raises CorruptSegment, HistoryError past the last step."""
        if version >= self.steps:
            raise HistoryError(f"step {version + 1} was asked of a run that made {self.steps}")
        fresh = [read_batch(self._groups, location) for location in self._steps[version]]
        return share.of(fresh + [reused.read(self._groups) for reused in self._reused[version]])

    async def discard(self, version: int, reason: DropReason) -> None:
        """There are no other groups."""
        raise HistoryError(
            f"step {version + 1} can not be learned ({reason}), and the past holds no other groups"
        )

    async def checkpointed(self, version: int) -> None:
        """A checkpoint is on disk: nothing to note."""

    async def counts(self) -> dict[str, int]:
        """As a ledger's: everything was trained long ago."""
        trained = sum(map(len, self._steps))
        return {
            "issued": trained,
            "in_flight": 0,
            "complete": 0,
            "taken": 0,
            "trained": trained,
            "dropped": 0,
        }
