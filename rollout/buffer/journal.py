"""The journal: every finished turn of every unfinished group, so that no worker's death costs a sampled token.

    record    magic, length of the payload (4 bytes, little-endian), 16 bytes of blake3 of it, payload
    payload   the Arrow IPC message of one batch of JOURNAL_SCHEMA

A file is removed once none of its groups is unfinished. What no longer counts although its group is unfinished (turns
of weights that a rollback has left behind) is got rid of by writing the rest anew: the files before `first`, which
the ledger keeps, do not exist for a reader.
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
from rollout.wire.schema import JOURNAL_SCHEMA, VERSION, SchemaError, goes_on

log = logging.getLogger(__name__)

MAX_BYTES = 16 * 2**20  # size at which a file is closed
_NAME = b"MTJ"
_MAGIC = _NAME + VERSION
_HEADER = struct.Struct("<4sI16s")


class _Row(NamedTuple):
    attempt: int
    batch: pa.RecordBatch
    place: int  # in the batch

    @property
    def slice(self) -> pa.RecordBatch:
        return self.batch.slice(self.place, 1)

    @property
    def newest_version(self) -> int:
        versions = self.batch.column("versions")[self.place].values.to_numpy()
        return int(versions.max()) if len(versions) else -1


Episodes = dict[int, list[_Row]]  # by episode: its turns in order, without a gap


@dataclass(frozen=True, slots=True)
class Rewritten:
    """A journal written anew; it counts once the ledger has `first`."""

    first: int
    rows: dict[int, Episodes]
    files: dict[int, set[int]]


class Journal:
    """One writer. `attempts` are the unfinished groups and the newest attempt of each; no other rows are read.

    `damaged`: a record in the middle does not hold. What came before it is known; the caller rewrites and adopts.
    """

    def __init__(
        self, folder: Path, first: int, attempts: Mapping[int, int], max_bytes: int = MAX_BYTES
    ) -> None:
        self._files = NumberedFiles(folder, "turns", "journal", max_bytes, first=first)
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
        """Write these rows; they are durable after `sync` and known after `keep` of what this returns."""
        return [(self._files.append(*_record(batch))[0], batch) for batch in batches]

    def sync(self) -> None:
        self._files.sync()

    def mark(self) -> Mark:
        return self._files.mark()

    def rewind(self, mark: Mark) -> None:
        """Take back what was appended since `mark`."""
        self._files.rewind(mark)

    def keep(self, written: Iterable[tuple[int, pa.RecordBatch]]) -> None:
        """Rows that are on disk are what an assignment holds from now on."""
        for number, batch in written:
            groups = self._groups.setdefault(number, set())
            columns = (batch.column(name).to_pylist() for name in ("group_id", "attempt", "episode", "turn"))
            for place, (group_id, attempt, episode, turn) in enumerate(zip(*columns, strict=True)):
                rows = self._rows.setdefault(group_id, {}).setdefault(episode, [])
                if goes_on(len(rows), rows[-1].attempt if rows else -1, attempt, turn):
                    rows[turn:] = [_Row(attempt, batch, place)]
                    groups.add(group_id)

    def turns(self, group_id: int) -> pa.RecordBatch | None:
        """All durable turns of a group: episodes in order, turns in order."""
        return _together(self._rows.get(group_id, {}))

    def has_turns_of(self, group_id: int, attempt: int) -> bool:
        """Whether this very attempt has recorded a turn."""
        return any(row.attempt == attempt for rows in self._rows.get(group_id, {}).values() for row in rows)

    def finish(self, group_ids: Iterable[int]) -> None:
        """These groups are complete or dropped, and the ledger has it durably."""
        for group_id in group_ids:
            self._rows.pop(group_id, None)
            for groups in self._groups.values():
                groups.discard(group_id)
        self._remove_finished()

    def rewrite(self, group_ids: Collection[int], up_to: int | None = None) -> Rewritten:
        """Write the turns of these groups anew, synced: each episode up to its first token of a version > `up_to`."""
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
        """The ledger has `first`: what was written before is gone, a damaged file set aside."""
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
        # A file behind a damaged one is not known by its groups, but `adopt` removes it.
        for number in [number for number, groups in self._groups.items() if not groups]:
            if number not in (self._files.open_number, self._damaged):
                self._files.path(number).unlink()
                del self._groups[number]


def rows_of(
    batch: pa.RecordBatch, attempts: Mapping[int, int], earlier: bool = False
) -> pa.RecordBatch | None:
    """The rows of these groups and exactly these attempts (or `earlier` ones too); None where there are none."""
    pairs = zip(batch.column("group_id").to_pylist(), batch.column("attempt").to_pylist(), strict=True)
    limits = [(attempts.get(group_id, -1), attempt) for group_id, attempt in pairs]
    places = [
        place
        for place, (limit, attempt) in enumerate(limits)
        if attempt == limit or (earlier and attempt < limit)
    ]
    if len(places) == batch.num_rows:
        return batch if places else None
    return batch.take(pa.array(places, type=pa.int32())) if places else None


def read_journal(path: Path) -> tuple[list[pa.RecordBatch], int | None]:
    """The whole records of a file, and the place of a damaged one behind them; a torn tail is no damage."""
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
    """Whether what is no record is what a crash leaves at the end of a file: too few bytes, or zeros."""
    tail = data[offset:]
    if tail[:3] == _NAME and tail[3:4] not in (b"", VERSION):
        raise SchemaError(
            f"{path}: turns of schema version {tail[3:4].decode(errors='replace')}, but this Manta reads "
            f"version {VERSION.decode()}"
        )
    if not tail.strip(b"\0"):
        return True
    if len(tail) >= _HEADER.size:
        magic, length, _ = _HEADER.unpack_from(tail)
        if magic != _MAGIC or len(tail) - _HEADER.size >= length:
            return False
    # A damaged length would hide the records behind it.
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
