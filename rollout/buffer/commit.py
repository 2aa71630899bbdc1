"""A commit: rows of turns and of finished groups on disk before the ledger refers to them, all of them or none."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence

import pyarrow as pa

from rollout.buffer.journal import Journal
from rollout.buffer.leases import Leases
from rollout.buffer.ledger import EpisodeRow, Ledger
from rollout.buffer.segments import Location, SegmentWriter
from rollout.wire.trajectory import Slot, StaleSlot

FinishedGroup = tuple[Slot, pa.RecordBatch, Sequence[EpisodeRow]]  # a group to be committed


def accepted(
    finished: Sequence[FinishedGroup], leases: Leases, ledger: Ledger
) -> tuple[dict[int, FinishedGroup], list[StaleSlot | None]]:
    """Those that are to be stored, by group id, and the error of each group; None: it is stored, or will be."""
    new: dict[int, FinishedGroup] = {}
    answers: list[StaleSlot | None] = []
    for group in finished:
        slot = group[0]
        if leases.is_current(slot):
            new.setdefault(slot.group_id, group)
            answers.append(None)
        else:
            newest = ledger.attempt_and_state(slot.group_id)
            stored = newest in [(slot.attempt, state) for state in ("complete", "taken", "trained")]
            answers.append(None if stored else StaleSlot.of(slot))
    return new, answers


def write(
    rows: Sequence[pa.RecordBatch],
    groups: Mapping[int, FinishedGroup],
    ledger: Ledger,
    segments: SegmentWriter,
    journal: Journal,
) -> dict[int, Location]:
    """Store turns in the journal and groups in segments, sync each, then tell the ledger; where each group lies.

    OSError or sqlite3.Error, having changed nothing.
    """
    if rows:
        ledger.sync()  # no turn on disk without its group
    marks = segments.mark(), journal.mark()
    try:
        locations = {group_id: segments.append(batch) for group_id, (_, batch, _) in groups.items()}
        written = journal.append(rows)
        if locations:
            segments.sync()
        if written:
            journal.sync()
        if locations:
            ledger.complete([(slot, locations[at], episodes) for at, (slot, _, episodes) in groups.items()])
    except (OSError, sqlite3.Error):
        segments.rewind(marks[0])
        journal.rewind(marks[1])
        raise
    journal.keep(written)
    return locations
