"""A weight version as its difference to the one before: few bytes where few words have changed.

A step at a usual learning rate moves most bfloat16 words by less than their resolution, so they stay as they were, and
most others change by one unit in the last place. A delta says of each tensor which words have changed (one bit a word)
and in which bits (old XOR new, of those words alone, the first bytes of all before the second ones), packed by zstd.
Nothing is rounded: the bytes that a receiver makes are those of the version, and the manifest's checksums are of them,
not of the delta.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rollout.wire.weights import ByteArray, TensorSpec, WeightMismatch

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


def _words(array: ByteArray, word_bytes: int) -> NDArray[np.unsignedinteger]:
    """View numbers as unsigned integers: bits are compared, so that -0 differs from 0 and a NaN equals itself."""
    return array.view(np.dtype(f"u{word_bytes}"))
