"""The version that a node's workers hold: who applies a delta to what, and who fetches and verifies nothing."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rollout.wire import weights
from rollout.wire.delta import encoded
from rollout.wire.held_version import HeldVersion
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
    replace(received, verified=False).verify()
    worker.loaded()
    return [array for _, array in received.tensors()]


OLD = as_bytes(list(range(100))), as_bytes([5] * 400), as_bytes([1, 2])
NEW = as_bytes([*range(99), 7]), as_bytes([5] * 400), as_bytes([3, 4])


def test_who_holds_the_base_applies_the_delta_and_opens_nothing_else(tmp_path: Path) -> None:
    first = whole(0, *OLD)
    second = with_delta(first, 1, *NEW)
    assert second.delta is not None
    sent, full = second.delta.sizes, second.manifest.sizes
    assert sent[0] < full[0] and sent[1] < full[1]
    assert sent[2] == full[2], "every word has changed: the tensor is sent whole"
    worker = HeldVersion(tmp_path / "versions")
    held_by(worker, first)
    received = held_by(worker, replace(second, handle=UNREACHABLE))
    assert [array.tolist() for array in received] == [array.tolist() for array in NEW]


def test_who_joins_late_or_missed_a_version_or_holds_another_of_that_number_gets_the_whole(
    tmp_path: Path,
) -> None:
    first = whole(0, *OLD)
    second = with_delta(first, 1, *NEW)
    third = with_delta(second, 2, *OLD)
    assert third.delta is not None
    out_of_reach = replace(third, delta=replace(third.delta, handle=UNREACHABLE))
    of_a_lost_future = whole(1, NEW[0], OLD[1], OLD[2])
    for place, before in enumerate(([], [first], [of_a_lost_future])):
        worker = HeldVersion(tmp_path / f"versions-{place}")
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
    damage: Callable[[ByteArray, ByteArray], ByteArray], why: str, tmp_path: Path
) -> None:
    first = whole(0, *OLD)
    second = with_delta(first, 1, *NEW)
    assert second.delta is not None
    other = encoded(OLD[0], as_bytes([9, *range(1, 100)]), 2)
    assert other is not None
    worker = HeldVersion(tmp_path / "versions")
    held_by(worker, first)
    with pytest.raises(WeightMismatch, match=f"^version 1: {why}$"):
        held_by(worker, corrupted(second, damage(second.delta.handle.open(second.delta.sizes)[0], other)))
    received = held_by(worker, replace(second, delta=replace(second.delta, handle=UNREACHABLE)))
    assert [array.tolist() for array in received] == [array.tolist() for array in NEW]


def test_a_delta_to_the_wrong_base_cannot_pass_the_checksums(tmp_path: Path) -> None:
    first = whole(0, *OLD)
    second = with_delta(first, 1, *NEW)
    assert second.delta is not None
    other = whole(0, OLD[0], NEW[1] + 1, OLD[2])
    worker = HeldVersion(tmp_path / "versions")
    held_by(worker, other)
    lying = replace(second, delta=replace(second.delta, base=other.manifest.digest))
    with pytest.raises(WeightMismatch, match="version 1: tensor t1 arrived with another checksum"):
        held_by(worker, lying)


def values(arrays: list[ByteArray]) -> list[list[int]]:
    return [array.tolist() for array in arrays]


def test_the_other_workers_of_a_node_fetch_hash_and_copy_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workers = [HeldVersion(tmp_path / "versions") for _ in range(3)]
    first = whole(0, *OLD)
    second = with_delta(first, 1, *NEW)
    third = with_delta(second, 2, *OLD)
    hashed: list[int] = []

    def noted(array: ByteArray) -> str:
        hashed.append(array.nbytes)
        return checksum(array)

    monkeypatch.setattr(weights, "checksum", noted)
    out_of_reach = [replace(update, handle=UNREACHABLE, delta=None) for update in (first, second, third)]
    for leading, (update, known, tensors) in enumerate(
        zip((first, second, third), out_of_reach, (OLD, NEW, OLD), strict=True)
    ):
        # Another worker is the first each time: what it makes does not lie in the memory that it made itself.
        order = workers[leading:] + workers[:leading]
        made = order[0].receive(update)
        others = [worker.receive(known) for worker in order[1:]]
        for received in (made, *others):
            assert values([array for _, array in received.tensors()]) == values(list(tensors))
        inodes = {os.stat(received.handle.address).st_ino for received in (made, *others)}
        assert len(inodes) == 1, "one copy a node"
        for worker in workers:
            worker.loaded()
    assert hashed == 3 * [array.nbytes for array in OLD]


def test_nothing_is_written_to_memory_that_an_engine_loads_from(tmp_path: Path) -> None:
    slow, quick = (HeldVersion(tmp_path / "versions") for _ in range(2))
    first = whole(0, *OLD)
    loading = [array for _, array in slow.receive(first).tensors()]
    assert values(held_by(quick, with_delta(first, 1, *NEW))) == values(list(NEW))
    assert values(loading) == values(list(OLD))
    slow.loaded()
    second = with_delta(first, 1, *NEW)
    assert values(held_by(slow, with_delta(second, 2, *OLD))) == values(list(OLD))


def _make_and_hold(file: Path, arrays: tuple[ByteArray, ...], made: object, held: object) -> None:
    """In another process: make version 0, or stop within it."""

    def frozen(array: ByteArray) -> str:
        os.kill(os.getpid(), signal.SIGSTOP)
        return checksum(array)

    if held is None:
        made.set()  # type: ignore[attr-defined]
        weights.checksum = frozen
    worker = HeldVersion(file)
    worker.receive(whole(0, *arrays))
    made.set()  # type: ignore[attr-defined]
    held.wait(60)  # type: ignore[attr-defined]


def test_what_a_worker_held_that_was_killed_is_no_base(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    made, held = spawn.Event(), spawn.Event()
    file = tmp_path / "versions"
    process = spawn.Process(target=_make_and_hold, args=(file, OLD, made, held))
    process.start()
    try:
        assert made.wait(60)
        worker = HeldVersion(file)
        known = replace(whole(0, *OLD), handle=UNREACHABLE)
        assert values(held_by(worker, known)) == values(list(OLD)), "of the process that lives"
    finally:
        process.kill()
        process.join(60)
    late = HeldVersion(file)
    second = with_delta(whole(0, *OLD), 1, *NEW)
    assert second.delta is not None
    second = replace(second, delta=replace(second.delta, handle=UNREACHABLE))
    assert values(held_by(late, second)) == values(list(NEW)), "copied whole"


def test_a_worker_that_stops_while_it_makes_a_version_keeps_no_other_waiting(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    begun = spawn.Event()
    file = tmp_path / "versions"
    process = spawn.Process(target=_make_and_hold, args=(file, OLD, begun, None))
    process.start()
    try:
        assert begun.wait(60)
        os.waitpid(process.pid or 0, os.WUNTRACED)
        worker = HeldVersion(file, wait_seconds=0.1)
        assert values(held_by(worker, whole(0, *OLD))) == values(list(OLD))
    finally:
        process.kill()
        process.join(60)
