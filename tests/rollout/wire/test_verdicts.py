"""Of the processes of a node one verifies a version's bytes, whatever becomes of the others."""

from __future__ import annotations

import multiprocessing
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rollout.wire import weights
from rollout.wire.verdicts import Verdicts
from rollout.wire.weights import (
    ByteArray,
    Probe,
    TensorSpec,
    WeightManifest,
    WeightMismatch,
    WeightUpdate,
    checksum,
    write_memory,
)

SIZES = (300_000, 70_000)


def _update(version: int = 0, arrays: list[ByteArray] | None = None) -> tuple[WeightUpdate, object]:
    sound = [np.full(size, version, dtype=np.uint8) for size in SIZES]
    specs = [TensorSpec(f"t{n}", "bfloat16", (a.nbytes // 2,), checksum(a)) for n, a in enumerate(sound)]
    handle, alive = write_memory(arrays or sound)
    return WeightUpdate(WeightManifest(version, tuple(specs), Probe((), (), 0.0)), handle), alive


def _verify(file: Path, update: WeightUpdate, counted: Path) -> None:
    """In another process: note every tensor that is hashed."""

    def noted(array: ByteArray) -> str:
        with counted.open("a", encoding="utf-8") as log:
            log.write(f"{array.nbytes}\n")
        return checksum(array)

    weights.checksum = noted
    assert Verdicts(file).verified(update).verified


def _hashed(counted: Path) -> list[int]:
    return [int(line) for line in counted.read_text("utf-8").split()] if counted.exists() else []


def test_processes_of_a_node_hash_a_version_once(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    counted = tmp_path / "counted"
    kept = []
    for version in (0, 1):
        update, alive = _update(version)
        kept.append(alive)
        given = tmp_path / "verdicts", update, counted
        processes = [spawn.Process(target=_verify, args=given) for _ in range(4)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(60)
            assert process.exitcode == 0
        assert _hashed(counted) == [*SIZES] * (version + 1)


def test_what_was_not_hashed_here_is_refused_by_every_process(tmp_path: Path) -> None:
    verdicts = Verdicts(tmp_path / "verdicts")
    sound, _alive = _update()
    verdicts.verified(sound)
    damaged = [np.zeros(size, dtype=np.uint8) for size in SIZES]
    damaged[1][5] = 1
    broken, _kept = _update(0, damaged)
    assert broken.manifest == sound.manifest  # the verdict is of other memory
    for _ in range(2):
        with pytest.raises(WeightMismatch, match="tensor t1 arrived with another checksum"):
            verdicts.verified(broken)
    again = replace(sound.manifest, tensors=(replace(sound.manifest.tensors[0], checksum="0"),) * 2)
    with pytest.raises(WeightMismatch, match="t0"):
        verdicts.verified(replace(sound, manifest=again))


def _hold(file: Path, update: WeightUpdate, held: object) -> None:
    """In another process: begin to verify, and never end."""

    def frozen(array: ByteArray) -> str:
        held.set()  # type: ignore[attr-defined]
        os.kill(os.getpid(), signal.SIGSTOP)
        return checksum(array)

    weights.checksum = frozen
    Verdicts(file).verified(update)


@pytest.mark.parametrize("end", [signal.SIGKILL, None], ids=["killed", "frozen"])
def test_a_process_that_never_ends_keeps_no_other_waiting(end: signal.Signals | None, tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    file, held = tmp_path / "verdicts", spawn.Event()
    update, _alive = _update()
    process = spawn.Process(target=_hold, args=(file, update, held))
    process.start()
    try:
        assert held.wait(60)
        if end is not None:
            os.kill(process.pid or 0, end)
        assert Verdicts(file, wait_seconds=0.1).verified(update).verified
    finally:
        process.kill()
        process.join(60)
