"""Segments: append-only files of record batches, plain Arrow IPC streams that any Arrow reader opens.

One writer appends and syncs. Offsets of single batches are remembered by whoever needs to read one again. A file is
never reopened for writing: a restarted writer begins the next segment, so a torn tail stays a tail.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedWriter
from pathlib import Path

import pyarrow as pa

from rollout.wire.schema import SCHEMA, require_version

_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"


@dataclass(frozen=True, slots=True)
class Location:
    """Where one record batch lies: segment number, and the byte range of its IPC message."""

    segment: int
    offset: int
    length: int


class SegmentWriter:
    """Appends batches to `folder/segment-NNNNNN.arrows`; a file is closed when it reaches `max_bytes`."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._max_bytes = max_bytes
        self._number = max((number for number, _ in segment_files(folder)), default=-1)
        self._file: BufferedWriter | None = None

    def append(self, batch: pa.RecordBatch) -> Location:
        """Write one batch; it is durable after the next `sync`."""
        if self._file is None or self._file.tell() >= self._max_bytes:
            self.close()
            self._file = self._next_file()
        offset = self._file.tell()
        return Location(self._number, offset, self._file.write(batch.serialize()))

    def sync(self) -> None:
        """Make everything appended so far survive a crash of the machine."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """End the open file, synced; the next append begins another."""
        if self._file is not None:
            self._file.write(_END_OF_STREAM)
            self.sync()
            self._file.close()
            self._file = None

    def _next_file(self) -> BufferedWriter:
        self._number += 1
        file = _path(self._folder, self._number).open("xb")
        self._sync_folder()
        # A stream is the schema's message and one message a batch. Arrow's own writer holds the schema back until the
        # first batch, which would blur where that batch begins.
        file.write(SCHEMA.serialize())
        return file

    def _sync_folder(self) -> None:
        # The file's name must survive a crash too, not only its bytes.
        descriptor = os.open(self._folder, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def _path(folder: Path, number: int) -> Path:
    return folder / f"segment-{number:06d}.arrows"


def segment_files(folder: Path) -> list[tuple[int, Path]]:
    """The segments of a folder with their numbers, in order."""
    found = [(int(path.stem.removeprefix("segment-")), path) for path in folder.glob("segment-*.arrows")]
    return sorted(found)


def read_batch(folder: Path, location: Location) -> pa.RecordBatch:
    """Read back one batch by its location; SchemaError where the file is of another version."""
    path = _path(folder, location.segment)
    with path.open("rb") as file:
        require_version(pa.ipc.read_schema(file), str(path))
        file.seek(location.offset)
        message = pa.ipc.read_message(file.read(location.length))
    return pa.ipc.read_record_batch(message, SCHEMA)


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
