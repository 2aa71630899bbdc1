"""The journal: every finished turn of every unfinished group, so that the loss of a worker costs no sampled token.

    record    magic, length of the payload (4 bytes, little-endian), 16 bytes of blake3 of it, payload
    payload   the Arrow IPC message of one batch of JOURNAL_SCHEMA

A file is removed once all of its groups are finished. Turns of an unfinished group become invalid when a rollback
discards their weights. The valid turns are then written to new files, and readers ignore files before `first`, a number
that the ledger stores.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
from blake3 import blake3

from rollout.buffer.append_only import Mark, NumberedFiles
from rollout.wire.schema import JOURNAL_SCHEMA, VERSION, SchemaError, extends_prefix

log = logging.getLogger(__name__)

MAX_BYTES = 16 * 2**20  # size at which a file is closed
_NAME = b"MTJ"
_MAGIC = _NAME + VERSION
_HEADER = struct.Struct("<4sI16s")


class _Row(NamedTuple):
    attempt: int
    batch: pa.RecordBatch
    position: int  # in the batch

    @property
    def slice(self) -> pa.RecordBatch:
        return self.batch.slice(self.position, 1)

    @property
    def newest_version(self) -> int:
        versions = self.batch.column("versions")[self.position].values.to_numpy()
        return int(versions.max()) if len(versions) else -1


Episodes = dict[int, list[_Row]]  # by episode: its turns in order, without a gap


@dataclass(frozen=True, slots=True)
class Rewritten:
    """A rewritten journal; it is valid once the ledger has `first`."""

    first: int
    rows: dict[int, Episodes]
    files: dict[int, set[int]]


class Journal:
    """Turns of unfinished groups, with one writer. attempts: these groups and the newest attempt of each. durable: as
    of `NumberedFiles`.

    damaged: a record in the middle is corrupt. The turns before it are known; the caller rewrites and adopts.
    """

    def __init__(
        self,
        folder: Path,
        first: int,
        attempts: Mapping[int, int],
        max_bytes: int = MAX_BYTES,
        durable: bool = True,
    ) -> None:
        self._files = NumberedFiles(folder, "turns", "journal", max_bytes, first=first, durable=durable)
        self._rows: dict[int, Episodes] = {}  # by group
        self._groups: dict[int, set[int]] = {}  # by file: its unfinished groups
        self._damaged: int | None = None
        for number, path in self._files.files():
            if number < first:
                path.unlink()
            elif self._damaged is None:
                self._read(number, path, attempts)
        self._remove_finished()

    @property
    def damaged(self) -> bool:
        return self._damaged is not None

    def append(self, batches: Sequence[pa.RecordBatch]) -> list[tuple[int, pa.RecordBatch]]:
        """Write these rows; they are durable after `sync` and readable after `keep` of the returned list."""
        return [(self._files.append(*_record(batch))[0], batch) for batch in batches]

    def sync(self) -> None:
        self._files.sync()

    def mark(self) -> Mark:
        return self._files.mark()

    def rewind(self, mark: Mark) -> None:
        """Remove what was appended since `mark`."""
        self._files.rewind(mark)

    def keep(self, written: Iterable[tuple[int, pa.RecordBatch]]) -> None:
        """Make rows that are on disk part of assignments."""
        for number, batch in written:
            groups = self._groups.setdefault(number, set())
            columns = (batch.column(name).to_pylist() for name in ("group_id", "attempt", "episode", "turn"))
            for index, (group_id, attempt, episode, turn) in enumerate(zip(*columns, strict=True)):
                rows = self._rows.setdefault(group_id, {}).setdefault(episode, [])
                if extends_prefix(len(rows), rows[-1].attempt if rows else -1, attempt, turn):
                    rows[turn:] = [_Row(attempt, batch, index)]
                    groups.add(group_id)

    def turns(self, group_id: int) -> pa.RecordBatch | None:
        """Return all durable turns of a group: episodes in order, turns in order."""
        return _together(self._rows.get(group_id, {}))

    def has_turns_of(self, group_id: int, attempt: int) -> bool:
        """Whether this attempt has recorded a turn."""
        return any(row.attempt == attempt for rows in self._rows.get(group_id, {}).values() for row in rows)

    def finish(self, group_ids: Iterable[int]) -> None:
        """Forget groups that are complete or dropped, durably in the ledger."""
        for group_id in group_ids:
            self._rows.pop(group_id, None)
            for groups in self._groups.values():
                groups.discard(group_id)
        self._remove_finished()

    def rewrite(self, group_ids: Collection[int], up_to: int | None = None) -> Rewritten:
        """Write the turns of these groups to new files, synced: each episode up to its first token above `up_to`."""
        self._files.close()
        first = self._files.next_number
        rows: dict[int, Episodes] = {}
        files: dict[int, set[int]] = {}
        before = self._files.mark()
        try:
            for group_id in sorted(group_ids):
                rows[group_id] = _cut(self._rows.get(group_id, {}), up_to)
                batch = _together(rows[group_id])
                if batch is not None:
                    number, _ = self._files.append(*_record(batch))
                    files.setdefault(number, set()).add(group_id)
            self.sync()
        except OSError:
            self._files.rewind(before)
            raise
        return Rewritten(first, rows, files)

    def adopt(self, rewritten: Rewritten) -> None:
        """Use a rewritten journal, whose `first` the ledger has: remove older files, set a damaged one aside."""
        self._rows, self._groups = rewritten.rows, rewritten.files
        if self._damaged is not None:
            self._files.set_aside(self._damaged)
            self._damaged = None
        for number, path in self._files.files():
            if number < rewritten.first:
                path.unlink()

    def close(self) -> None:
        self._files.close()

    def _read(self, number: int, path: Path, attempts: Mapping[int, int]) -> None:
        batches, damaged_at = read_journal(path)
        kept = (rows_of(batch, attempts, earlier=True) for batch in batches)
        self.keep((number, batch) for batch in kept if batch is not None)
        self._groups.setdefault(number, set())
        if damaged_at is not None:
            log.warning(
                "%s: the record at byte %d is damaged; turns written after it are sampled again, and the file is set "
                "aside",
                path,
                damaged_at,
            )
            self._damaged = number

    def _remove_finished(self) -> None:
        # Groups of a file behind a damaged one are unknown; `adopt` removes it.
        for number in [number for number, groups in self._groups.items() if not groups]:
            if number not in (self._files.open_number, self._damaged):
                self._files.path(number).unlink()
                del self._groups[number]


def rows_of(
    batch: pa.RecordBatch, attempts: Mapping[int, int], earlier: bool = False
) -> pa.RecordBatch | None:
    """Select the rows of these groups and attempts (with `earlier`, also of previous attempts); None without rows."""
    pairs = zip(batch.column("group_id").to_pylist(), batch.column("attempt").to_pylist(), strict=True)
    limits = [(attempts.get(group_id, -1), attempt) for group_id, attempt in pairs]
    indices = [
        index
        for index, (limit, attempt) in enumerate(limits)
        if attempt == limit or (earlier and attempt < limit)
    ]
    if len(indices) == batch.num_rows:
        return batch if indices else None
    return batch.take(pa.array(indices, type=pa.int32())) if indices else None


def read_journal(path: Path) -> tuple[list[pa.RecordBatch], int | None]:
    """Read the whole records of a file, and the offset of a damaged one behind them; a torn tail is no damage."""
    data = path.read_bytes()
    batches: list[pa.RecordBatch] = []
    offset = 0
    while offset < len(data):
        payload = _payload(data, offset)
        if payload is None:
            return batches, None if _torn(data, offset, path) else offset
        batches.append(pa.ipc.read_record_batch(pa.ipc.read_message(payload), JOURNAL_SCHEMA))
        offset += _HEADER.size + len(payload)
    return batches, None


def _record(batch: pa.RecordBatch) -> tuple[bytes, pa.Buffer]:
    payload = batch.serialize()
    return _HEADER.pack(_MAGIC, payload.size, blake3(payload).digest(length=16)), payload


def _payload(data: bytes, offset: int) -> bytes | None:
    if len(data) - offset < _HEADER.size:
        return None
    magic, length, checksum = _HEADER.unpack_from(data, offset)
    begin = offset + _HEADER.size
    payload = data[begin : begin + length]
    whole = magic == _MAGIC and len(payload) == length and blake3(payload).digest(length=16) == checksum
    return payload if whole else None


def _torn(data: bytes, offset: int, path: Path) -> bool:
    """Whether the bytes at `offset`, which are no record, are what a crash leaves: a prefix of one, or zeros."""
    tail = data[offset:]
    if tail[:3] == _NAME and tail[3:4] not in (b"", VERSION):
        raise SchemaError(
            f"{path}: turns of schema version {tail[3:4].decode(errors='replace')}, but this Manta reads "
            f"version {VERSION.decode()}; use the Manta that wrote them"
        )
    if not tail.strip(b"\0"):
        return True
    if len(tail) >= _HEADER.size:
        magic, length, _ = _HEADER.unpack_from(tail)
        if magic != _MAGIC or len(tail) - _HEADER.size >= length:
            return False
    # A valid record behind it shows that its length is damaged.
    follower = data.find(_MAGIC, offset + 1)
    while follower >= 0:
        if _payload(data, follower) is not None:
            return False
        follower = data.find(_MAGIC, follower + 1)
    return True


def _cut(episodes: Episodes, up_to: int | None) -> Episodes:
    if up_to is None:
        return episodes
    cut = {}
    for episode, rows in episodes.items():
        known = next((turn for turn, row in enumerate(rows) if row.newest_version > up_to), len(rows))
        cut[episode] = rows[:known]
    return cut


def _together(episodes: Episodes) -> pa.RecordBatch | None:
    rows = [row.slice for _, rows in sorted(episodes.items()) for row in rows]
    return pa.concat_batches(rows) if rows else None
