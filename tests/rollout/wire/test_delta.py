"""Deltas between weight versions: their form, and what they make of the base."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from rollout.wire.delta import apply, encoded
from rollout.wire.weights import ByteArray, TensorSpec


def plain_of(found: ByteArray | None) -> list[int]:
    """The bytes of a difference before compression."""
    assert found is not None
    size = int.from_bytes(found[:8].tobytes(), "little")
    return list(pa.decompress(found[8:].tobytes(), size, codec="zstd", asbytes=True))


def test_a_difference_is_a_bit_for_each_word_and_then_the_changed_bits_plane_by_plane() -> None:
    old = np.zeros(100, dtype=np.uint16)
    new = old.copy()
    old[[1, 8]] = 0x1234, 0x00FF
    new[[1, 8]] = 0x1235, 0x0100
    found = encoded(old.view(np.uint8), new.view(np.uint8), 2)
    assert plain_of(found) == [0b01000000, 0b10000000, *[0] * 11, 0x01, 0xFF, 0x00, 0x01]


def test_words_are_compared_by_their_bits() -> None:
    numbers = np.array([0.0, np.nan, 1.0, 2.0] * 8, dtype=np.float32)
    other = numbers.copy()
    other[0] = -0.0
    found = encoded(numbers.view(np.uint8), other.view(np.uint8), 4)
    assert plain_of(found) == [0b10000000, 0, 0, 0, 0, 0, 0, 0x80], "-0 is another number, NaN the same"


@pytest.mark.parametrize("word_bytes", [2, 4])
@pytest.mark.parametrize("share", [0.0, 1e-5, 0.03, 0.2, 0.3, 1.0])
@pytest.mark.parametrize("words", [0, 1, 7, 200, 2**18 - 1, 2**18 + 9, 2**19 + 1])
def test_applied_to_the_base_a_difference_gives_the_other_tensor(
    words: int, share: float, word_bytes: int
) -> None:
    rng = np.random.default_rng(words)
    old = rng.integers(0, 2**16, words).astype(f"u{word_bytes}")
    new = np.where(rng.random(words) < share, old + 1, old).astype(old.dtype)
    held = old.copy().view(np.uint8)
    found = encoded(held, new.view(np.uint8), word_bytes)
    if words >= 200:
        assert (found is None) == (share > 0.25)
    assert found is None or found.nbytes < new.nbytes
    spec = TensorSpec("t", {2: "bfloat16", 4: "float32"}[word_bytes], (words,), "")
    apply(new.view(np.uint8) if found is None else found, held, spec, 1)
    assert held.tobytes() == new.tobytes()
