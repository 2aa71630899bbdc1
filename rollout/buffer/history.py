"""Groups that a finished run was trained on, step by step, read from its ledger and segments."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pyarrow as pa

from rollout.buffer.ledger_checks import check_log, examine, naming
from rollout.buffer.reuse import OF_STEPS
from rollout.buffer.segments import Location, ReusedGroup, read_batch
from rollout.wire.partition import WHOLE, Partition
from rollout.wire.trajectory import DropReason

_STEPS = """
SELECT taken_version, segment, "offset", length, checksum FROM groups WHERE state = 'trained'
ORDER BY taken_version, group_id
"""


class HistoryError(ValueError):
    """A run's groups cannot be trained on again; the message says why."""


class History:
    """A source of groups for a learner: those that another learner took, at the same steps."""

    def __init__(self, run: Path) -> None:
        ledger = run / "ledger.sqlite"
        if not ledger.is_file():
            raise HistoryError(
                f"{run}: no ledger.sqlite, so this is no run folder; give the folder of a finished run"
            )
        check_log(ledger)
        uri = f"{ledger.absolute().as_uri()}?mode=ro"
        with naming(ledger), closing(sqlite3.connect(uri, uri=True)) as db:
            examine(db, ledger)
            rows = db.execute(_STEPS).fetchall()
            known = db.execute("SELECT 1 FROM sqlite_master WHERE name = 'reuses'").fetchone()
            again = db.execute(OF_STEPS).fetchall() if known else []
        self._groups = run / "groups"
        self._steps: list[list[Location]] = []
        for version, *location in rows:
            if version == len(self._steps):
                self._steps.append([])
            self._steps[-1].append(Location(*location))
        self._reused: list[list[ReusedGroup]] = [[] for _ in self._steps]
        for version, group_id, *location, nth in again:
            if version < len(self._steps):
                self._reused[version].append(ReusedGroup(group_id, nth, Location(*location)))

    @property
    def steps(self) -> int:
        """Learner steps of the run."""
        return len(self._steps)

    async def take(self, version: int, timeout_s: float, share: Partition = WHOLE) -> list[pa.RecordBatch]:
        """Return the groups of the step after `version`. Raises CorruptSegment, and HistoryError past the last step."""
        if version >= self.steps:
            raise HistoryError(
                f"the run has {self.steps} steps, and step {version + 1} was asked for; lower steps"
            )
        fresh = [read_batch(self._groups, location) for location in self._steps[version]]
        return share.of(fresh + [reused.read(self._groups) for reused in self._reused[version]])

    def groups(self) -> Iterator[pa.RecordBatch]:
        """Every group the run has trained on, once, in the order of its steps. Raises CorruptSegment."""
        for locations in self._steps:
            for location in locations:
                yield read_batch(self._groups, location)

    async def discard(self, version: int, reason: DropReason) -> None:
        """Raise HistoryError: a finished run has no other groups for a step."""
        raise HistoryError(
            f"step {version + 1} cannot be trained ({reason}), and a replay has no other groups"
        )

    async def checkpointed(self, version: int) -> None:
        """Do nothing: all groups are trained already."""

    async def counts(self) -> dict[str, int]:
        """Balance as of `Ledger.counts`: all groups are trained."""
        trained = sum(map(len, self._steps))
        return {
            "issued": trained,
            "in_flight": 0,
            "complete": 0,
            "taken": 0,
            "trained": trained,
            "dropped": 0,
        }
