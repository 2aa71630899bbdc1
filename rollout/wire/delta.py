"""A weight version as its difference to the one before: few bytes where few words have changed.

A step at a usual learning rate moves most bfloat16 words by less than their resolution, so they stay as they were, and
most others change by one unit in the last place. A delta says of each tensor which words have changed (one bit a word)
and in which bits (old XOR new, of those words alone, the first bytes of all before the second ones), packed by zstd.
Nothing is rounded: the bytes that a receiver makes are those of the version, and the manifest's checksums are of them,
not of the delta.
"""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rollout.wire.weights import ByteArray, Delta, MemoryFile, TensorSpec, WeightMismatch, WeightUpdate, parts

_PIECE = 1 << 18  # words compared at a time: what is read again is still in the processor's cache
_MOST_CHANGED = 1 / 4  # of a tensor's words; a float32 step changes nearly all
_ZSTD = pa.Codec("zstd", compression_level=1)
_HEADER = np.dtype("<u8")  # bytes before compression


def encoded(old: ByteArray, new: ByteArray, word_bytes: int) -> ByteArray | None:
    """The difference of two tensors of equal size. None if it is not shorter, or too many words have changed."""
    before, after = _words(old, word_bytes), _words(new, word_bytes)
    bitmaps, changes, left = [], [], int(len(after) * _MOST_CHANGED)
    for begin in range(0, len(after), _PIECE):
        piece = slice(begin, begin + _PIECE)
        bits = before[piece] ^ after[piece]
        changed = bits != 0
        bitmaps.append(np.packbits(changed))
        changes.append(bits[changed])
        left -= len(changes[-1])
        if left < 0:
            return None
    if not bitmaps:
        return None
    planes = np.concatenate(changes).view(np.uint8).reshape(-1, word_bytes).T
    plain = np.concatenate([*bitmaps, planes.ravel()])
    packed = np.frombuffer(_ZSTD.compress(plain.data), np.uint8)
    difference = np.concatenate([np.array([plain.nbytes], _HEADER).view(np.uint8), packed])
    return difference if difference.nbytes < new.nbytes else None


def apply(difference: ByteArray, held: ByteArray, spec: TensorSpec, version: int) -> None:
    """Make `held`, a tensor's bytes at the delta's base, those of the version. WeightMismatch for an impossible delta.

    difference: what `encoded` returned, or the whole tensor. One of the right form with wrong content is found by the
    tensor's checksum.
    """
    if difference.nbytes == held.nbytes:
        held[:] = difference
        return
    words = _words(held, spec.word_bytes)
    bitmap_bytes = -(-len(words) // 8)
    plain = _decompressed(difference, bitmap_bytes + held.nbytes)
    changed = np.unpackbits(plain[:bitmap_bytes], count=len(words)).view(np.bool_)
    if plain.nbytes != bitmap_bytes + np.count_nonzero(changed) * spec.word_bytes:
        raise WeightMismatch(f"version {version}: the delta of tensor {spec.name} is damaged")
    planes = plain[bitmap_bytes:].reshape(spec.word_bytes, -1)
    bits = np.ascontiguousarray(planes.T).view(words.dtype).ravel()
    words[changed] ^= bits


def _decompressed(difference: ByteArray, most: int) -> ByteArray:
    """The bytes before compression, empty where these are none; most: an upper bound of a sound difference."""
    head = _HEADER.itemsize
    size = int(difference[:head].view(_HEADER)[0]) if difference.nbytes > head else 0
    if not 0 < size <= most:
        return np.empty(0, dtype=np.uint8)
    try:
        return np.frombuffer(_ZSTD.decompress(difference[head:].data, size), np.uint8)
    except OSError:  # of pyarrow, for what zstd refuses
        return np.empty(0, dtype=np.uint8)


class HeldVersion:
    """The bytes of the version that a worker holds, in memory that its engine's processes map.

    A delta is applied to them. A version without one, or with one to another base (after a missed version, or after
    the learner has gone back to a checkpoint), is copied whole from its own handle.
    """

    def __init__(self) -> None:
        self._digest = ""  # of the version held; empty before the first, and while one is being written
        self._file: MemoryFile | None = None
        self._whole: ByteArray = np.empty(0, dtype=np.uint8)

    def receive(self, update: WeightUpdate) -> WeightUpdate:
        """Fetch a version into this memory; returns it with a handle there. Blocks: call it in a thread.

        Raises WeightMismatch for a payload of another form than the manifest's. The contents are verified by the engine
        that opens the handle, as of any version (`WeightUpdate.verify`).
        """
        base, self._digest = self._digest, ""
        if update.delta is not None and update.delta.base == base:
            self._apply(update, update.delta)
        else:
            self._copy(update)
        self._digest = update.manifest.digest
        assert self._file is not None, "the first version is copied whole"
        return replace(update, handle=self._file.handle, delta=None)

    def _apply(self, update: WeightUpdate, delta: Delta) -> None:
        manifest = update.manifest
        held = parts(self._whole, manifest.sizes)
        differences = delta.handle.open(delta.sizes)
        for difference, own, spec in zip(differences, held, manifest.tensors, strict=True):
            apply(difference, own, spec, update.version)

    def _copy(self, update: WeightUpdate) -> None:
        size = update.manifest.nbytes
        if self._file is None or self._whole.nbytes != size:
            self._file = MemoryFile("manta-held-weights")
            os.truncate(self._file.path, size)
            self._whole = np.memmap(self._file.path, dtype=np.uint8, mode="r+")
        for own, (_, array) in zip(parts(self._whole, update.manifest.sizes), update.tensors(), strict=True):
            own[:] = array


def _words(array: ByteArray, word_bytes: int) -> NDArray[np.unsignedinteger]:
    """View numbers as unsigned integers: bits are compared, so that -0 differs from 0 and a NaN equals itself."""
    return array.view(np.dtype(f"u{word_bytes}"))
