"""Deltas between weight versions: their form, and who applies one to what."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from rollout.wire.delta import HeldVersion, apply, encoded
from rollout.wire.weights import (
    ByteArray,
    Delta,
    Handle,
    Probe,
    TensorSpec,
    WeightManifest,
    WeightMismatch,
    WeightUpdate,
    checksum,
    inline,
)

UNREACHABLE = Handle("rollout.wire.nowhere:open", "")  # opening it fails the test


def as_bytes(values: list[int], word_bytes: int = 2) -> ByteArray:
    return np.array(values, dtype=f"u{word_bytes}").view(np.uint8)


def manifest_of(version: int, *tensors: ByteArray) -> WeightManifest:
    specs = [
        TensorSpec(f"t{n}", "bfloat16", (each.nbytes // 2,), checksum(each)) for n, each in enumerate(tensors)
    ]
    return WeightManifest(version, tuple(specs), Probe((), (), 0.0))


def whole(version: int, *tensors: ByteArray) -> WeightUpdate:
    return WeightUpdate(manifest_of(version, *tensors), inline(tensors))


def with_delta(before: WeightUpdate, version: int, *tensors: ByteArray) -> WeightUpdate:
    olds = [array for _, array in before.tensors()]
    found = [encoded(old, new, 2) for old, new in zip(olds, tensors, strict=True)]
    parts = [new if each is None else each for each, new in zip(found, tensors, strict=True)]
    delta = Delta(before.manifest.digest, inline(parts), tuple(part.nbytes for part in parts))
    return replace(whole(version, *tensors), delta=delta)


def held_by(worker: HeldVersion, update: WeightUpdate) -> list[ByteArray]:
    received = worker.receive(update)
    received.verify()
    return [array for _, array in received.tensors()]


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


OLD = as_bytes(list(range(100))), as_bytes([5] * 400), as_bytes([1, 2])
NEW = as_bytes([*range(99), 7]), as_bytes([5] * 400), as_bytes([3, 4])


def test_who_holds_the_base_applies_the_delta_and_opens_nothing_else() -> None:
    first = whole(0, *OLD)
    second = with_delta(first, 1, *NEW)
    assert second.delta is not None
    sent, full = second.delta.sizes, second.manifest.sizes
    assert sent[0] < full[0] and sent[1] < full[1]
    assert sent[2] == full[2], "every word has changed: the tensor is sent whole"
    worker = HeldVersion()
    held_by(worker, first)
    received = held_by(worker, replace(second, handle=UNREACHABLE))
    assert [array.tolist() for array in received] == [array.tolist() for array in NEW]


def test_who_joins_late_or_missed_a_version_or_holds_another_of_that_number_gets_the_whole() -> None:
    first = whole(0, *OLD)
    second = with_delta(first, 1, *NEW)
    third = with_delta(second, 2, *OLD)
    assert third.delta is not None
    out_of_reach = replace(third, delta=replace(third.delta, handle=UNREACHABLE))
    of_a_lost_future = whole(1, NEW[0], OLD[1], OLD[2])
    for before in ([], [first], [of_a_lost_future]):
        worker = HeldVersion()
        for update in before:
            held_by(worker, update)
        assert [array.tolist() for array in held_by(worker, out_of_reach)] == [
            array.tolist() for array in OLD
        ]


def corrupted(update: WeightUpdate, part: ByteArray) -> WeightUpdate:
    """The update with another first part of its delta."""
    assert update.delta is not None
    arrays = [part, *update.delta.handle.open(update.delta.sizes)[1:]]
    sizes = tuple(array.nbytes for array in arrays)
    return replace(update, delta=replace(update.delta, handle=inline(arrays), sizes=sizes))


DAMAGED, OTHER = "the delta of tensor t0 is damaged", "tensor t0 arrived with another checksum"


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda part, _: part[:0], DAMAGED),
        (lambda part, _: part[:5], DAMAGED),
        (lambda part, _: part[:-1], DAMAGED),
        (lambda part, _: np.concatenate([part[:8], part[:8], part[8:]]), DAMAGED),
        (lambda part, _: np.concatenate([part[:1] + 1, part[1:]]), DAMAGED),
        (lambda part, _: np.concatenate([part[:1], np.full(7, 255, np.uint8), part[8:]]), DAMAGED),
        (lambda part, other: other, OTHER),
    ],
    ids=["empty", "head only", "cut", "not zstd", "longer", "enormous", "of another version"],
)
def test_a_corrupted_delta_is_refused_by_name_and_what_it_left_is_no_base(
    damage: Callable[[ByteArray, ByteArray], ByteArray], why: str
) -> None:
    first = whole(0, *OLD)
    second = with_delta(first, 1, *NEW)
    assert second.delta is not None
    other = encoded(OLD[0], as_bytes([9, *range(1, 100)]), 2)
    assert other is not None
    worker = HeldVersion()
    held_by(worker, first)
    with pytest.raises(WeightMismatch, match=f"^version 1: {why}$"):
        held_by(worker, corrupted(second, damage(second.delta.handle.open(second.delta.sizes)[0], other)))
    received = held_by(worker, replace(second, delta=replace(second.delta, handle=UNREACHABLE)))
    assert [array.tolist() for array in received] == [array.tolist() for array in NEW]


def test_a_delta_to_the_wrong_base_cannot_pass_the_checksums() -> None:
    first = whole(0, *OLD)
    second = with_delta(first, 1, *NEW)
    assert second.delta is not None
    other = whole(0, OLD[0], NEW[1] + 1, OLD[2])
    worker = HeldVersion()
    held_by(worker, other)
    lying = replace(second, delta=replace(second.delta, base=other.manifest.digest))
    with pytest.raises(WeightMismatch, match="version 1: tensor t1 arrived with another checksum"):
        held_by(worker, lying)
