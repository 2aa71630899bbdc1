"""Safetensors files that all ranks write together, each its own rows: the same file for any number of ranks.

    plan     which tensors a file has and where, the same on every rank
    own      copies in host memory of the rows that this rank writes
    blocks   checksums of byte ranges of the file, in FILE.blocks: who reads some rows verifies the blocks they lie in

Blocks end where a 64th of a tensor's rows does (larger ones: at least 4 MiB), so that ranks of any usual number read
whole blocks.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.tensor import DTensor

from learner.model.tensor_files import BLOCKS, INDEX, TYPE_NAMES, Block, digest
from learner.parallel.ranks import Ranks
from learner.parallel.shards import of_first_copy, own_range

_LARGEST_FILE = 50 * 10**9  # bytes; a larger model has several, and an index
_LEAST_BLOCK = 4 << 20
_MOST_BLOCKS = 64  # of a tensor
_WRITTEN_BYTES = 16 << 20  # at a time


@dataclass(frozen=True, slots=True)
class Rows:
    """Consecutive numbers of a tensor, from number `start` on, in host memory: float [n] or of another type."""

    start: int
    numbers: Tensor


@dataclass(frozen=True, slots=True)
class Planned:
    """A tensor of a file: its shape and type."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> Planned:
        """That of a tensor, which may be sharded or without numbers."""
        return cls(tuple(tensor.shape), tensor.dtype)

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    @property
    def block_numbers(self) -> int:
        """Numbers of a block; the last one may have fewer."""
        rows, width = (self.shape[0], prod(self.shape[1:])) if self.shape else (1, 1)
        wanted = min(_MOST_BLOCKS, self.nbytes // _LEAST_BLOCK)
        count = 1 << max(wanted.bit_length() - 1, 0)
        return max(-(-rows // count) * width, 1)


@dataclass(slots=True)
class SharedFile:
    """One file, of which this rank writes `own`. name: its path within a folder."""

    name: str
    tensors: dict[str, Planned]
    own: dict[str, Rows] = field(default_factory=dict)

    @property
    def own_bytes(self) -> int:
        return sum(rows.numbers.nbytes for rows in self.own.values())

    @property
    def nbytes(self) -> int:
        return sum(planned.nbytes for planned in self.tensors.values())

    def write(self, folder: Path, lead: bool) -> list[Block]:
        """Write the own rows, and the lead the header; returns the blocks that it has written.

        Other ranks write the same file meanwhile.
        """
        header, starts = self._header()
        blocks = []
        descriptor = os.open(folder / self.name, os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            if lead:
                os.ftruncate(descriptor, len(header) + self.nbytes)
                blocks.append(_write(descriptor, 0, header))
            for name in sorted(self.own):
                rows = self.own[name]
                planned = self.tensors[name]
                for begin, end in _cut(rows, planned.block_numbers):
                    part = rows.numbers[begin - rows.start : end - rows.start]
                    bytes_ = memoryview(part.view(torch.uint8).numpy().data)
                    at = starts[name] + begin * planned.dtype.itemsize
                    blocks.append(_write(descriptor, at, bytes_))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        return blocks

    def _header(self) -> tuple[bytes, dict[str, int]]:
        """The file's first bytes, and where each tensor begins."""
        entries: dict[str, Any] = {}
        place = 0
        for name, planned in self.tensors.items():
            entries[name] = {
                "dtype": TYPE_NAMES[planned.dtype],
                "shape": list(planned.shape),
                "data_offsets": [place, place + planned.nbytes],
            }
            place += planned.nbytes
        said = json.dumps({"__metadata__": {"format": "pt"}} | entries, separators=(",", ":")).encode()
        said += b" " * (-len(said) % 8)
        header = len(said).to_bytes(8, "little") + said
        return header, {name: len(header) + entry["data_offsets"][0] for name, entry in entries.items()}


def _cut(rows: Rows, block: int) -> Iterator[tuple[int, int]]:
    """The rows' numbers, cut where blocks of the tensor end."""
    begin, end = rows.start, rows.start + len(rows.numbers)
    while begin < end:
        upto = min(end, (begin // block + 1) * block)
        yield begin, upto
        begin = upto


def _write(descriptor: int, begin: int, content: bytes | memoryview) -> Block:
    left, at = memoryview(content), begin
    while len(left):
        count = os.pwrite(descriptor, left[:_WRITTEN_BYTES], at)
        left, at = left[count:], at + count
    return Block(begin, at, digest(content))


def write_blocks(folder: Path, name: str, blocks: Sequence[Block]) -> None:
    """Write the checksums of a file that all ranks have written."""
    ordered = sorted((block.begin, block.end, block.digest) for block in blocks if block.end > block.begin)
    (folder / (name + BLOCKS)).write_text(json.dumps(ordered, separators=(",", ":")), encoding="utf-8")


def planned_files(name: str, tensors: Mapping[str, Planned]) -> list[SharedFile]:
    """The files of these tensors, in this order: one of this name, or with many bytes several, numbered."""
    parts: list[dict[str, Planned]] = [{}]
    held = 0
    for tensor, planned in tensors.items():
        if held + planned.nbytes > _LARGEST_FILE and parts[-1]:
            parts.append({})
            held = 0
        parts[-1][tensor] = planned
        held += planned.nbytes
    if len(parts) == 1:
        return [SharedFile(name, parts[0])]
    stem, _, kind = name.rpartition(".")
    return [
        SharedFile(f"{stem}-{number:05d}-of-{len(parts):05d}.{kind}", part)
        for number, part in enumerate(parts, 1)
    ]


def file_of(name: str, tensors: Mapping[str, Tensor], lead: bool) -> SharedFile:
    """One file of these tensors, with copies of what this rank writes; sharded tensors have their whole shape in it."""
    ordered = dict(
        sorted(tensors.items(), key=lambda named: -named[1].itemsize)
    )  # large numbers first: aligned
    file = SharedFile(name, {tensor: Planned.of(value) for tensor, value in ordered.items()})
    for tensor, value in ordered.items():
        give([file], tensor, own_rows(value, lead))
    return file


def index_of(files: Sequence[SharedFile]) -> str:
    """The index of several files of weights, as Hugging Face writes it."""
    weights = {tensor: file.name for file in files for tensor in file.tensors}
    return json.dumps(
        {"metadata": {"total_size": sum(file.nbytes for file in files)}, "weight_map": weights}, indent=2
    )


def give(files: Sequence[SharedFile], name: str, rows: Rows | None) -> None:
    """Have this rank write these rows of a tensor of one of the files."""
    if rows is not None and len(rows.numbers):
        next(file for file in files if name in file.tensors).own[name] = rows


@dataclass(frozen=True, slots=True)
class Folder:
    """What is written into one folder: files by all ranks, and by the lead what `beside` writes."""

    shared: Sequence[SharedFile]
    beside: Callable[[Path], None] = lambda folder: None

    @property
    def nbytes(self) -> int:
        """Bytes of the shared files."""
        return sum(file.nbytes for file in self.shared)


def write_together(folders: Mapping[str, Folder], root: Path, ranks: Ranks) -> None:
    """Write folders below `root`, by their paths there; a collective call.

    Every rank raises if one fails: its own error, or an OSError with the number and the text of the other's.
    """
    lead = not ranks.rank
    failed: Exception | None = None
    blocks: list[list[tuple[int, int, str]]] = []
    try:
        for path in folders if lead else ():
            (root / path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        failed = error
    ranks.gather(None)  # the folders are there
    try:
        for path, folder in folders.items():
            if lead:
                folder.beside(root / path)
            for file in folder.shared:
                blocks.append([(b.begin, b.end, b.digest) for b in file.write(root / path, lead)])
    except (OSError, SafetensorError) as error:
        failed = failed or error
    own = [failed and [getattr(failed, "errno", None), str(failed)], blocks]
    said = ranks.gather(own, everyone=True)
    for other, _ in said:
        if other:
            raise failed or OSError(other[0], other[1])
    if lead:
        of_files = iter(zip(*(each for _, each in said), strict=True))
        for path, folder in folders.items():
            for file in folder.shared:
                write_blocks(
                    root / path, file.name, [Block(*b) for of_rank in next(of_files) for b in of_rank]
                )
            if len(folder.shared) > 1:
                (root / path / INDEX).write_text(index_of(folder.shared), encoding="utf-8")


def own_rows(tensor: Tensor, lead: bool) -> Rows | None:
    """A copy of what this rank writes of a tensor: its rows of a sharded one; all of another, which the lead writes."""
    if isinstance(tensor, DTensor) and tensor.placements[0].is_shard():
        if not of_first_copy(tensor):
            return None
        return Rows(own_range(tensor)[0] * prod(tensor.shape[1:]), host_copy(tensor.to_local()))
    whole = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return Rows(0, host_copy(whole)) if lead else None


def host_copy(tensor: Tensor) -> Tensor:
    """A copy of a tensor's numbers in host memory, [n]; from a GPU the copy is only begun."""
    flat = tensor.detach().contiguous().view(-1)
    if flat.device.type == "cpu":
        return flat.clone()
    copy = torch.empty(len(flat), dtype=flat.dtype, pin_memory=True)
    return copy.copy_(flat, non_blocking=True)
