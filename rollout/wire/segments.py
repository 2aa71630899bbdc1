"""Segments: append-only files of record batches, plain Arrow IPC streams that any Arrow reader opens.

One writer appends and syncs. Offsets of single batches are remembered by whoever needs to read one again. A file is
never reopened for writing: a restarted writer begins the next segment, so a torn tail stays a tail.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from rollout.wire.schema import SCHEMA, require_version


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
        self._sink: pa.NativeFile | None = None
        self._file: pa.PythonFile | None = None
        self._writer: pa.ipc.RecordBatchStreamWriter | None = None

    def append(self, batch: pa.RecordBatch) -> Location:
        """Write one batch; it is durable after the next `sync`."""
        if self._writer is None or self._file.tell() >= self._max_bytes:
            self._next_file()
        offset = self._file.tell()
        self._writer.write_batch(batch)
        return Location(self._number, offset, self._file.tell() - offset)

    def sync(self) -> None:
        """Make everything appended so far survive a crash of the machine."""
        if self._sink is not None:
            self._sink.flush()
            os.fsync(self._sink.fileno())

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self.sync()
            self._sink.close()
            self._writer = None

    def _next_file(self) -> None:
        self.close()
        self._number += 1
        path = self._folder / f"segment-{self._number:06d}.arrows"
        self._sink = path.open("xb")
        self._file = pa.PythonFile(self._sink, mode="w")
        self._writer = pa.ipc.new_stream(self._file, SCHEMA)
        self._sync_folder()

    def _sync_folder(self) -> None:
        # The file's name must survive a crash too, not only its bytes.
        descriptor = os.open(self._folder, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def segment_files(folder: Path) -> list[tuple[int, Path]]:
    """The segments of a folder with their numbers, in order."""
    found = [(int(path.stem.removeprefix("segment-")), path) for path in folder.glob("segment-*.arrows")]
    return sorted(found)


def read_batch(folder: Path, location: Location) -> pa.RecordBatch:
    """Read back one batch by its location."""
    with (folder / f"segment-{location.segment:06d}.arrows").open("rb") as file:
        file.seek(location.offset)
        message = pa.ipc.read_message(pa.BufferReader(file.read(location.length)))
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
    """Every row stored under a folder of segments (RUN/groups, RUN/evaluations/NAME), in the order of writing."""
    batches = [batch for _, path in segment_files(folder) for batch in scan(path)]
    return pa.Table.from_batches(batches, schema=SCHEMA)
