"""Safetensors files read by rows: a rank reads the rows of its own part, each byte once, and nothing stays mapped.

    8 bytes: length of the header; the header, JSON: {name: {dtype, shape, data_offsets}}; the data, row by row

safetensors itself maps whole files, which then count as the memory of every rank that reads them.

A file may have checksums of its blocks beside it (FILE.blocks, see shared_files.py): they are verified by who reads.
"""

from __future__ import annotations

import ctypes
import json
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from io import RawIOBase
from math import prod
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from safetensors import SafetensorError
from torch import Tensor

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
TYPE_NAMES = {dtype: name for name, dtype in _TYPES.items()}
BLOCKS = ".blocks"  # ending of a file's checksums


@dataclass(frozen=True, slots=True)
class Block:
    """The checksum of a range of bytes of a file."""

    begin: int
    end: int
    digest: str


def digest(content: bytes | memoryview) -> str:
    """blake3 of some bytes, 16 bytes of it in hex."""
    return blake3(content, max_threads=blake3.AUTO).hexdigest(length=16)


class Changed(OSError):
    """A file is not what was written; the message says where, in one line."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of a file; indexing reads. start: of its data in the file, bytes."""

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    blocks: Sequence[Block] = ()

    def get_shape(self) -> list[int]:
        """Its shape, as transformers asks for it."""
        return list(self.shape)

    def get_dtype(self) -> str:
        """Its type by its name in the format, as transformers asks for it."""
        return TYPE_NAMES[self.dtype]

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    def __getitem__(self, index: Any) -> Tensor:
        """`[...]`: the tensor; `[rows]`, `[rows, ...]`: slices, of which only the rows are read from the file."""
        slices = index if isinstance(index, tuple) else (index,)
        if not self.shape or not isinstance(slices[0], slice):
            return self.rows(0, self.shape[0] if self.shape else 1)
        begin, end, _ = slices[0].indices(self.shape[0])
        read = self.rows(begin, max(begin, end))
        return read[(slice(None), *slices[1:])] if len(slices) > 1 else read

    def rows(self, begin: int, end: int) -> Tensor:
        """Read these rows into new memory. OSError if the file ends before them, Changed if a block is another."""
        shape = (end - begin, *self.shape[1:]) if self.shape else ()
        tensor = torch.empty(shape, dtype=self.dtype)
        room = memory_of(tensor)
        first = self.start + begin * self.row_bytes
        with self.file.open("rb", buffering=0) as stream:
            if not self.blocks:
                _read(stream, first, room)
                return tensor
            place = bisect_right(self.blocks, first, key=lambda block: block.begin) - 1
            while len(room) and place < len(self.blocks):
                count = _verified(stream, self.blocks[place], first, room)
                room, first, place = room[count:], first + count, place + 1
        if len(room):
            raise Changed(f"{self.file} has no checksum of all of {self.name}")
        return tensor

    @property
    def row_bytes(self) -> int:
        """Bytes of an entry of the first dimension."""
        return prod(self.shape[1:]) * self.dtype.itemsize


def memory_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on a CPU, while it lives. Unlike `numpy()` it leaves the storage resizable."""
    array = (ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr())
    return memoryview(array).cast("B")


def _read(stream: RawIOBase, first: int, room: memoryview) -> None:
    """Fill the room with a file's bytes from `first` on."""
    stream.seek(first)
    while len(room):
        count = stream.readinto(room)
        if not count:
            raise OSError(f"{stream.name} ends at byte {first}")  # type: ignore[attr-defined]
        room, first = room[count:], first + count


def _verified(stream: RawIOBase, block: Block, first: int, room: memoryview) -> int:
    """Read a block and put its bytes from `first` on into the room; returns how many those are."""
    count = min(block.end - first, len(room))
    whole = count == block.end - block.begin
    content = room[:count] if whole else memoryview(bytearray(block.end - block.begin))
    _read(stream, block.begin, content)
    if digest(content) != block.digest:
        raise Changed(f"{stream.name} has changed since it was written")  # type: ignore[attr-defined]
    if not whole:
        room[:count] = content[first - block.begin :][:count]
    return count


def blocks_of(file: Path) -> tuple[Block, ...]:
    """The checksums beside a file, in order; none where it has none."""
    beside = file.with_name(file.name + BLOCKS)
    if not beside.is_file():
        return ()
    try:
        said = json.loads(beside.read_text(encoding="utf-8"))
        return tuple(Block(int(begin), int(end), str(digest)) for begin, end, digest in said)
    except (ValueError, TypeError) as error:
        raise Changed(f"{beside} is broken ({error})") from error


def verify(file: Path) -> None:
    """Read a file and compare it with the checksums beside it. Changed if it is another, OSError if it is shorter."""
    with file.open("rb", buffering=0) as stream:
        for block in blocks_of(file):
            _verified(stream, block, block.begin, memoryview(bytearray(block.end - block.begin)))


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of a Hugging Face folder by name: those of its one file, or of all that its index lists.

    Raises OSError for a missing file, SafetensorError for one that is broken.
    """
    single = folder / WEIGHTS
    if single.is_file():
        return tensors_in(single)
    if not (folder / INDEX).is_file():
        raise OSError(f"{folder} has no {WEIGHTS} or {INDEX}")
    listed = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
    files = {str(file): tensors_in(folder / file) for file in sorted(set(listed.values()))}
    return {str(name): _of(files[file], name, folder / file) for name, file in listed.items()}


def tensors_in(file: Path) -> dict[str, StoredTensor]:
    """The tensors of one file. SafetensorError if it is broken or cut off."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 0 < length <= size - 8:
            raise SafetensorError(f"{file}: broken header")
        try:
            header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            blocks = blocks_of(file)
            found = {name: _stored(name, said, file, 8 + length, blocks) for name, said in header.items()}
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise SafetensorError(f"{file}: broken header ({error})") from error
    end = max((each.start + prod(each.shape) * each.dtype.itemsize for each in found.values()), default=0)
    if end > size:
        raise SafetensorError(f"{file}: {size} bytes instead of {end}")
    return found


def _stored(name: str, said: dict[str, Any], file: Path, data: int, blocks: Sequence[Block]) -> StoredTensor:
    shape: Sequence[int] = said["shape"]
    start = data + int(said["data_offsets"][0])
    return StoredTensor(name, file, _TYPES[said["dtype"]], tuple(shape), start, blocks)


def _of(tensors: dict[str, StoredTensor], name: str, file: Path) -> StoredTensor:
    if name not in tensors:
        raise SafetensorError(f"{file}: lacks the tensor {name}")
    return tensors[name]
