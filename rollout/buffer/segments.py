"""Segments: append-only files of record batches, plain Arrow IPC streams that any Arrow reader opens.

    message   0xffffffff, length of the metadata (4 bytes), the metadata with a seal at its end, the batch's buffers
    seal      magic, the length of the metadata (4 bytes) and of the buffers (8 bytes), CRC-32 of these three, 16
              bytes of blake3 of everything else in the message

The seal is in the padding of Arrow's metadata, which Arrow does not read. With it a reader detects damage from the file
alone. The ledger has offset and checksum of each batch too, for reading a single one.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import pyarrow as pa
from blake3 import blake3

from rollout.buffer.append_only import Mark, NumberedFiles, numbered
from rollout.wire.schema import SCHEMA, SchemaError, as_reused, require_version
from rollout.wire.trajectory import Slot

_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"
_CHECKSUM_BYTES = 16
_STEM, _SUFFIX = "segment", "arrows"
_FRAME = struct.Struct("<II")  # of a message: continuation, length of the metadata
_LENGTHS = struct.Struct("<8sIQ")
_SEAL = struct.Struct(f"<{_LENGTHS.size}sI{_CHECKSUM_BYTES}s")
_MAGIC = b"MTSEAL1\n"
# A stream is the schema's message and one message per batch. Arrow's own writer delays the schema until the first
# batch, which would hide the offset of that batch.
_UNSEALED_HEADER = SCHEMA.serialize().to_pybytes()  # of files written by an earlier Manta
_HEADER = SCHEMA.with_metadata({**(SCHEMA.metadata or {}), b"manta.sealed": b"1"}).serialize().to_pybytes()


@dataclass(frozen=True, slots=True)
class Location:
    """Location of one record batch: segment number, byte range of its IPC message, and its blake3 in hex."""

    segment: int
    offset: int
    length: int
    checksum: str


@dataclass(slots=True)
class CompleteGroup:
    """A complete group: the location of its rows, and the rows while they are in memory."""

    slot: Slot
    location: Location
    batch: pa.RecordBatch | None

    def read(self, folder: Path) -> pa.RecordBatch:
        """Return the rows. Raises CorruptSegment."""
        return self.batch or read_batch(folder, self.location)


@dataclass(frozen=True, slots=True)
class ReusedGroup:
    """A group that an earlier step was trained on."""

    group_id: int
    reuse: int  # number of this reuse, from 1
    location: Location

    def read(self, folder: Path) -> pa.RecordBatch:
        """Return the rows, marked as reused. Raises CorruptSegment."""
        return as_reused(read_batch(folder, self.location), self.reuse)


class CorruptSegment(RuntimeError):
    """A batch differs from what was written; the message names the file."""

    def __init__(self, path: Path, offset: int, why: str) -> None:
        super().__init__(f"{path}: {why} (batch at byte {offset})")
        self.segment = int(path.stem.removeprefix(f"{_STEM}-"))


class SegmentWriter:
    """Appends batches to `folder/segment-NNNNNN.arrows`; a file is closed when it reaches `max_bytes`.

    first: number of the first file, if the folder does not have all earlier ones. durable: as of `NumberedFiles`.
    """

    def __init__(self, folder: Path, max_bytes: int, first: int = 0, durable: bool = True) -> None:
        ends = {"header": _HEADER, "trailer": _END_OF_STREAM}
        self._files = NumberedFiles(folder, _STEM, _SUFFIX, max_bytes, **ends, first=first, durable=durable)

    @property
    def open_segment(self) -> int | None:
        """The segment that the next batch may be appended to."""
        return self._files.open_number

    def append(self, batch: pa.RecordBatch) -> Location:
        """Write one batch; it is durable after the next `sync`. An OSError leaves no part of it."""
        parts, checksum = _sealed(batch)
        segment, offset = self._files.append(*parts)
        return Location(segment, offset, sum(map(len, parts)), checksum)

    def sync(self) -> None:
        """Make all appended batches survive a crash of the machine."""
        self._files.sync()

    def mark(self) -> Mark:
        return self._files.mark()

    def rewind(self, mark: Mark) -> None:
        """Remove what was appended since `mark`."""
        self._files.rewind(mark)

    def set_aside(self, segment: int) -> Path:
        """Rename a corrupt file so that no reader takes it for a segment; it is kept for inspection."""
        return self._files.set_aside(segment)

    def close(self) -> None:
        """End the open file, synced; the next append begins another."""
        self._files.close()


def segment_path(folder: Path, number: int) -> Path:
    return folder / f"{_STEM}-{number:06d}.{_SUFFIX}"


def is_segment(name: str) -> bool:
    """Whether a file of this name is a segment."""
    return name.startswith(f"{_STEM}-") and name.endswith(f".{_SUFFIX}")


def segment_files(folder: Path) -> list[tuple[int, Path]]:
    """List the segments of a folder with their numbers, in order."""
    return numbered(folder, _STEM, _SUFFIX)


def remove_oldest(folder: Path, limit_bytes: float, needed: Collection[int | None]) -> None:
    """Remove segments, oldest first, until a folder holds at most `limit_bytes`; those in `needed` are kept."""
    sizes = {number: path.stat().st_size for number, path in segment_files(folder)}
    for number in oldest_beyond(sizes, limit_bytes, needed):
        segment_path(folder, number).unlink()


def oldest_beyond(sizes: Mapping[int, int], limit_bytes: float, needed: Collection[int | None]) -> list[int]:
    """The oldest segments that exceed a limit, of segments with these sizes, without those in `needed`."""
    excess, found = sum(sizes.values()) - limit_bytes, []
    for number, size in sorted(sizes.items()):
        if excess > 0 and number not in needed:
            found.append(number)
            excess -= size
    return found


def read_batch(folder: Path, location: Location) -> pa.RecordBatch:
    """Read one batch by its location and verify its checksum.

    Raises CorruptSegment for a changed or missing batch, SchemaError for a file of another version.
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
    """Write these batches as one new segment, unless the folder has an identical one."""
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
    """Yield all whole batches of one segment; a batch that a crash left incomplete at the end is skipped.

    Raises CorruptSegment for damage that a crash does not explain.
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
    """Read all rows under a folder of segments (RUN/groups, RUN/evaluations/NAME), in the order of writing.

    docs/stored_data.md lists the columns. The table is empty for a folder without segments. A group that was reissued
    after a crash has rows of each attempt; the ledger has the valid one. Raises FileNotFoundError.
    """
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"no folder {folder}; rows are in RUN/groups and RUN/evaluations/NAME")
    batches = [batch for _, path in segment_files(Path(folder)) for batch in scan(path)]
    return pa.Table.from_batches(batches, schema=SCHEMA)


def _sealed(batch: pa.RecordBatch) -> tuple[list[Any], str]:
    """Return the parts of a batch's message, and its checksum in hex."""
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
    """Read the seal's bytes of the message at `offset` (fewer where the file ends), and their offset."""
    frame = data[offset : offset + _FRAME.size]
    length = _FRAME.unpack(frame)[1] if len(frame) == _FRAME.size else 0
    seal_offset = offset + _FRAME.size + length - _SEAL.size
    return (data[seal_offset : seal_offset + _SEAL.size] if length >= _SEAL.size else b""), seal_offset


def _read_seal(seal: bytes) -> _Seal | None:
    """Parse a seal; None if the bytes are none. Its batch is not verified here."""
    if len(seal) < _SEAL.size:
        return None
    lengths, checksum, digest = _SEAL.unpack(seal)
    magic, metadata, body = _LENGTHS.unpack(lengths)
    return _Seal(metadata, body, digest) if magic == _MAGIC and crc32(lengths) == checksum else None


def _whole(data: Any, offset: int) -> tuple[int, str] | None:
    """Length and checksum of the sealed message at `offset`; None if there is no whole one."""
    seal, seal_offset = _seal_of(data, offset)
    said, end = _read_seal(seal), seal_offset + _SEAL.size
    if said is None or said.metadata != end - offset - _FRAME.size or len(data) < end + said.body:
        return None
    view = memoryview(data)
    parts = (
        view[offset:seal_offset],
        view[seal_offset : seal_offset + _LENGTHS.size],
        view[end : end + said.body],
    )
    return (end + said.body - offset, said.digest.hex()) if _digest(*parts) == said.digest else None


def _is_damaged(data: mmap.mmap, offset: int) -> bool:
    """Whether an incomplete message at `offset` is damage: a crash leaves only a prefix of one, or zeros."""
    if not data[offset:].strip(b"\0"):
        return False
    if len(data) - offset > len(_END_OF_STREAM) and data[-len(_END_OF_STREAM) :] == _END_OF_STREAM:
        return True  # the file has its trailer, so all of it was written
    seal, expected = _seal_of(data, offset)
    if len(seal) == _SEAL.size and seal.strip(b"\0"):
        said = _read_seal(seal)
        return said is None or len(data) >= expected + _SEAL.size + said.body
    candidate = data.find(_MAGIC, offset)
    while candidate >= 0:  # the damage may be in its length
        if _read_seal(data[candidate : candidate + _SEAL.size]) is not None:
            return True
        candidate = data.find(_MAGIC, candidate + 1)
    return False


def _unsealed(data: mmap.mmap) -> Iterator[pa.RecordBatch]:
    """Yield the batches of a file written by an earlier Manta; their checksums are in the ledger only."""
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
