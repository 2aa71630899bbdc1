"""Segments: append-only files of record batches, plain Arrow IPC streams that any Arrow reader opens.

Offsets and checksums of single batches are remembered by whoever needs to read one again.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
from blake3 import blake3

from rollout.wire.appending import Mark, NumberedFiles, numbered
from rollout.wire.schema import SCHEMA, require_version

_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"
_CHECKSUM_BYTES = 16
_STEM, _SUFFIX = "segment", "arrows"
# A stream is the schema's message and one message a batch. Arrow's own writer holds the schema back until the first
# batch, which would blur where that batch begins.
_HEADER = SCHEMA.serialize().to_pybytes()


@dataclass(frozen=True, slots=True)
class Location:
    """Where one record batch lies: segment number, the byte range of its IPC message, and blake3 of it in hex."""

    segment: int
    offset: int
    length: int
    checksum: str


class CorruptSegment(RuntimeError):
    """A batch is not what was written; the message names the file."""

    def __init__(self, path: Path, location: Location, why: str) -> None:
        super().__init__(f"{path}: {why} (batch at byte {location.offset})")
        self.segment = location.segment


class SegmentWriter:
    """Appends batches to `folder/segment-NNNNNN.arrows`; a file is closed when it reaches `max_bytes`."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._files = NumberedFiles(folder, _STEM, _SUFFIX, max_bytes, header=_HEADER, trailer=_END_OF_STREAM)

    @property
    def open_segment(self) -> int | None:
        """The segment that the next batch may go to."""
        return self._files.open_number

    def append(self, batch: pa.RecordBatch) -> Location:
        """Write one batch; it is durable after the next `sync`. An OSError leaves nothing of it behind."""
        message = batch.serialize()
        segment, offset = self._files.append(message)
        return Location(segment, offset, message.size, _checksum(message))

    def sync(self) -> None:
        """Make everything appended so far survive a crash of the machine."""
        self._files.sync()

    def mark(self) -> Mark:
        return self._files.mark()

    def rewind(self, mark: Mark) -> None:
        """Take back what was appended since `mark`."""
        self._files.rewind(mark)

    def set_aside(self, segment: int) -> Path:
        """Keep a corrupt file for people, under a name that no reader takes for a segment."""
        return self._files.set_aside(segment)

    def close(self) -> None:
        """End the open file, synced; the next append begins another."""
        self._files.close()


def segment_path(folder: Path, number: int) -> Path:
    return folder / f"{_STEM}-{number:06d}.{_SUFFIX}"


def segment_files(folder: Path) -> list[tuple[int, Path]]:
    """The segments of a folder with their numbers, in order."""
    return numbered(folder, _STEM, _SUFFIX)


def remove_oldest(folder: Path, limit_bytes: float, needed: Collection[int | None]) -> None:
    """Remove segments, the oldest first, until a folder holds no more than this; those needed stay."""
    sizes = {number: path.stat().st_size for number, path in segment_files(folder)}
    excess = sum(sizes.values()) - limit_bytes
    for number, size in sizes.items():
        if excess > 0 and number not in needed:
            segment_path(folder, number).unlink()
            excess -= size


def read_batch(folder: Path, location: Location) -> pa.RecordBatch:
    """Read back one batch by its location, checked.

    Raises CorruptSegment where it is not what was written, SchemaError where the file is of another version.
    """
    path = segment_path(folder, location.segment)
    try:
        with path.open("rb") as file:
            header = file.read(len(_HEADER))
            file.seek(location.offset)
            message = file.read(location.length)
    except FileNotFoundError:
        raise CorruptSegment(path, location, "the file is gone") from None
    if header != _HEADER:
        _check_header(header, path, location)
    if _checksum(message) != location.checksum:
        raise CorruptSegment(path, location, "the checksum does not match")
    return pa.ipc.read_record_batch(pa.ipc.read_message(message), SCHEMA)


def write_once(folder: Path, batches: Sequence[pa.RecordBatch]) -> None:
    """Write these batches as one whole segment of their own, or leave it be where the folder has that very segment."""
    folder.mkdir(parents=True, exist_ok=True)
    there = segment_files(folder)
    partial = folder / f"{_STEM}.partial"
    try:
        with partial.open("wb") as file:
            file.write(_HEADER)
            for batch in batches:
                file.write(batch.serialize())
            file.write(_END_OF_STREAM)
            file.flush()
            os.fsync(file.fileno())
        if not any(_same_bytes(partial, path) for _, path in there):
            number = there[-1][0] + 1 if there else 0
            partial.rename(segment_path(folder, number))
    finally:
        partial.unlink(missing_ok=True)


def scan(path: Path) -> Iterator[pa.RecordBatch]:
    """All whole batches of one segment; what a crash left half-written at the end is passed over."""
    with pa.memory_map(str(path)) as source:
        try:
            reader = pa.ipc.open_stream(source)
        except pa.ArrowInvalid:
            return  # not even the schema was written
        require_version(reader.schema, str(path))
        while True:
            try:
                batch = reader.read_next_batch()
            except (StopIteration, pa.ArrowInvalid, OSError):
                return
            yield batch


def read_rows(folder: Path) -> pa.Table:
    """Every row stored under a folder of segments (RUN/groups, RUN/evaluations/NAME), in the order of writing.

    A group issued again after a crash has rows of each attempt; the ledger says which one counts.
    """
    batches = [batch for _, path in segment_files(folder) for batch in scan(path)]
    return pa.Table.from_batches(batches, schema=SCHEMA)


def _checksum(message: pa.Buffer | bytes) -> str:
    return blake3(message).hexdigest(length=_CHECKSUM_BYTES)


def _check_header(header: bytes, path: Path, location: Location) -> None:
    try:
        schema = pa.ipc.read_schema(pa.py_buffer(header))
    except (pa.ArrowException, OSError) as error:
        raise CorruptSegment(path, location, f"its schema cannot be read: {error}") from None
    require_version(schema, str(path))


def _same_bytes(one: Path, other: Path) -> bool:
    return one.stat().st_size == other.stat().st_size and _file_checksum(one) == _file_checksum(other)


def _file_checksum(path: Path) -> str:
    return blake3().update_mmap(path).hexdigest(length=_CHECKSUM_BYTES)
