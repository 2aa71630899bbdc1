"""Segments: append-only files of record batches, plain Arrow IPC streams that any Arrow reader opens.

    message   0xffffffff, length of the metadata (4 bytes), the metadata with a seal at its end, the batch's buffers
    seal      magic, the length of the metadata (4 bytes) and of the buffers (8 bytes), CRC-32 of these three, 16
              bytes of blake3 of everything else in the message

Arrow pads its metadata and reads none of the padding: there the seal lies, so that every reader of ours can tell what
was written from what was damaged, with nothing but the file. Offsets and checksums of single batches are remembered
besides by those who read one again.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import pyarrow as pa
from blake3 import blake3

from rollout.buffer.append_only import Mark, NumberedFiles, numbered
from rollout.wire.schema import SCHEMA, SchemaError, require_version

_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"
_CHECKSUM_BYTES = 16
_STEM, _SUFFIX = "segment", "arrows"
_FRAME = struct.Struct("<II")  # of a message: continuation, length of the metadata
_LENGTHS = struct.Struct("<8sIQ")
_SEAL = struct.Struct(f"<{_LENGTHS.size}sI{_CHECKSUM_BYTES}s")
_MAGIC = b"MTSEAL1\n"
# A stream is the schema's message and one message a batch. Arrow's own writer holds the schema back until the first
# batch, which would blur where that batch begins.
_UNSEALED_HEADER = SCHEMA.serialize().to_pybytes()  # of files that an earlier Manta has written
_HEADER = SCHEMA.with_metadata({**(SCHEMA.metadata or {}), b"manta.sealed": b"1"}).serialize().to_pybytes()


@dataclass(frozen=True, slots=True)
class Location:
    """Where one record batch lies: segment number, the byte range of its IPC message, and blake3 of it in hex."""

    segment: int
    offset: int
    length: int
    checksum: str


class CorruptSegment(RuntimeError):
    """A batch is not what was written; the message names the file."""

    def __init__(self, path: Path, offset: int, why: str) -> None:
        super().__init__(f"{path}: {why} (batch at byte {offset})")
        self.segment = int(path.stem.removeprefix(f"{_STEM}-"))


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
        parts, checksum = _sealed(batch)
        segment, offset = self._files.append(*parts)
        return Location(segment, offset, sum(map(len, parts)), checksum)

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
        raise CorruptSegment(path, location.offset, "the file is gone") from None
    if header != _HEADER and not header.startswith(_UNSEALED_HEADER):
        _check_header(header, path, location.offset)
    sealed = _whole(message, 0)
    checksum = sealed[1] if sealed else _checksum(message)
    if len(message) != location.length or checksum != location.checksum:
        raise CorruptSegment(path, location.offset, "the checksum does not match")
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
                file.writelines(_sealed(batch)[0])
            file.write(_END_OF_STREAM)
            file.flush()
            os.fsync(file.fileno())
        if not any(_same_bytes(partial, path) for _, path in there):
            number = there[-1][0] + 1 if there else 0
            partial.rename(segment_path(folder, number))
    finally:
        partial.unlink(missing_ok=True)


def scan(path: Path) -> Iterator[pa.RecordBatch]:
    """All whole batches of one segment; what a crash left half-written at the end is passed over.

    Raises CorruptSegment where something else than a crash has changed the file.
    """
    if path.stat().st_size == 0:
        return
    with path.open("rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    begin = len(_HEADER)
    if data[:begin] != _HEADER:
        if data[: len(_UNSEALED_HEADER)] == _UNSEALED_HEADER:
            yield from _unsealed(data)
            return
        if len(data) < begin or not data[:].strip(b"\0"):
            return  # not even the schema was written
        begin = _FRAME.size + _FRAME.unpack_from(data)[1]
        _check_header(data[:begin], path, 0)
    buffer, offset = pa.py_buffer(data), begin
    while data[offset : offset + len(_END_OF_STREAM)] != _END_OF_STREAM:
        sealed = _whole(data, offset)
        if sealed is None:
            if _is_damaged(data, offset):
                why = "damaged; restore the file from a copy, or move it away to go on without its rows"
                raise CorruptSegment(path, offset, why)
            return
        yield pa.ipc.read_record_batch(pa.ipc.read_message(buffer.slice(offset, sealed[0])), SCHEMA)
        offset += sealed[0]


def read_rows(folder: str | Path) -> pa.Table:
    """Every row stored under a folder of segments (RUN/groups, RUN/evaluations/NAME), in the order of writing.

    The columns are those of docs/stored_data.md. Empty for a folder without segments; FileNotFoundError without one.
    A group issued again after a crash has rows of each attempt; the ledger says which one counts.
    """
    if not Path(folder).is_dir():
        raise FileNotFoundError(
            f"there is no folder {folder}; rows are in RUN/groups and RUN/evaluations/NAME"
        )
    batches = [batch for _, path in segment_files(Path(folder)) for batch in scan(path)]
    return pa.Table.from_batches(batches, schema=SCHEMA)


def _sealed(batch: pa.RecordBatch) -> tuple[list[Any], str]:
    """The parts of a batch's message, and its checksum in hex."""
    message = memoryview(batch.serialize())
    continuation, length = _FRAME.unpack_from(message)
    metadata, body = message[_FRAME.size : _FRAME.size + length], message[_FRAME.size + length :]
    frame = _FRAME.pack(continuation, length + _SEAL.size)
    lengths = _LENGTHS.pack(_MAGIC, length + _SEAL.size, len(body))
    digest = _digest(frame, metadata, lengths, body)
    return [frame, metadata, _SEAL.pack(lengths, crc32(lengths), digest), body], digest.hex()


class _Seal(NamedTuple):
    metadata: int  # bytes
    body: int  # bytes
    digest: bytes


def _seal_of(data: Any, offset: int) -> tuple[bytes, int]:
    """The bytes where the message at `offset` ought to have its seal (fewer: the file ends there), and their place."""
    frame = data[offset : offset + _FRAME.size]
    length = _FRAME.unpack(frame)[1] if len(frame) == _FRAME.size else 0
    place = offset + _FRAME.size + length - _SEAL.size
    return (data[place : place + _SEAL.size] if length >= _SEAL.size else b""), place


def _read_seal(seal: bytes) -> _Seal | None:
    """What a seal says, where it is one; whether its batch fits it is not known yet."""
    if len(seal) < _SEAL.size:
        return None
    lengths, checksum, digest = _SEAL.unpack(seal)
    magic, metadata, body = _LENGTHS.unpack(lengths)
    return _Seal(metadata, body, digest) if magic == _MAGIC and crc32(lengths) == checksum else None


def _whole(data: Any, offset: int) -> tuple[int, str] | None:
    """Length and checksum of the sealed message at `offset`; None where what stands there is no such message."""
    seal, place = _seal_of(data, offset)
    said, end = _read_seal(seal), place + _SEAL.size
    if said is None or said.metadata != end - offset - _FRAME.size or len(data) < end + said.body:
        return None
    view = memoryview(data)
    parts = view[offset:place], view[place : place + _LENGTHS.size], view[end : end + said.body]
    return (end + said.body - offset, said.digest.hex()) if _digest(*parts) == said.digest else None


def _is_damaged(data: mmap.mmap, offset: int) -> bool:
    """Whether what is no whole message is more than a crash leaves: too few bytes of one, or zeros."""
    if not data[offset:].strip(b"\0"):
        return False
    if len(data) - offset > len(_END_OF_STREAM) and data[-len(_END_OF_STREAM) :] == _END_OF_STREAM:
        return True  # the file was ended, so all of it was written
    seal, expected = _seal_of(data, offset)
    if len(seal) == _SEAL.size and seal.strip(b"\0"):
        said = _read_seal(seal)
        return said is None or len(data) >= expected + _SEAL.size + said.body
    place = data.find(_MAGIC, offset)
    while place >= 0:  # its length may be what is damaged
        if _read_seal(data[place : place + _SEAL.size]) is not None:
            return True
        place = data.find(_MAGIC, place + 1)
    return False


def _unsealed(data: mmap.mmap) -> Iterator[pa.RecordBatch]:
    """The batches of a file that an earlier Manta has written; only the ledger can tell whether they were changed."""
    reader = pa.ipc.open_stream(pa.py_buffer(data))
    while True:
        try:
            batch = reader.read_next_batch()
        except (StopIteration, pa.ArrowInvalid, OSError):
            return
        yield batch


def _digest(*parts: Any) -> bytes:
    hasher = blake3()
    for part in parts:
        hasher.update(part)
    return hasher.digest(length=_CHECKSUM_BYTES)


def _checksum(message: pa.Buffer | bytes) -> str:
    return blake3(message).hexdigest(length=_CHECKSUM_BYTES)


def _check_header(header: bytes, path: Path, offset: int) -> None:
    try:
        schema = pa.ipc.read_schema(pa.py_buffer(header))
        require_version(schema, str(path))
    except SchemaError:
        raise
    except (pa.ArrowException, OSError, LookupError, ValueError) as error:
        why = f"its schema cannot be read ({str(error).splitlines()[0]})"
        raise CorruptSegment(path, offset, why) from None


def _same_bytes(one: Path, other: Path) -> bool:
    return one.stat().st_size == other.stat().st_size and _file_checksum(one) == _file_checksum(other)


def _file_checksum(path: Path) -> str:
    return blake3().update_mmap(path).hexdigest(length=_CHECKSUM_BYTES)
