"""Weights through Ray's object store: what arrives, and that a version nobody needs is let go."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rollout.wire.weights import ByteArray, joined, parts

ROOT = Path(__file__).parents[3]
SCRIPT = """
import gc, json, ray
import numpy as np
from rollout.wire.actors import open_object, put_object

ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
core = ray._private.worker.global_worker.core_worker
arrays = [np.arange(size, dtype=np.uint8) for size in (5, 1, 300_000)]
handle, reference = put_object(arrays)
opened = open_object(handle.address, [array.nbytes for array in arrays])
equal = all(np.array_equal(ours, theirs) for ours, theirs in zip(arrays, opened, strict=True))
name = reference.hex().encode()  # as Ray keys its counts
held = name in core.get_all_reference_counts()
del opened, reference
gc.collect()
print(json.dumps({"equal": equal, "held": held, "held_after": name in core.get_all_reference_counts()}))
ray.shutdown()
"""


@pytest.mark.slow
def test_a_version_arrives_whole_and_lives_only_as_long_as_its_reference() -> None:
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, encoding="utf-8")
    assert json.loads(done.stdout.splitlines()[-1]) == {"equal": True, "held": True, "held_after": False}


def _arrays() -> list[ByteArray]:
    return parts(np.arange(10, dtype=np.uint8), [3, 1, 6])


def test_consecutive_parts_of_a_buffer_are_joined_without_a_copy() -> None:
    arrays = _arrays()
    assert joined(arrays) is arrays[0].base


@pytest.mark.parametrize(
    "arrays",
    [_arrays()[::-1], _arrays()[:1], [array.copy() for array in _arrays()], [_arrays()[0], _arrays()[2]]],
    ids=["another order", "a part only", "buffers of their own", "of two buffers"],
)
def test_other_arrays_are_joined_by_copying(arrays: list[ByteArray]) -> None:
    assert joined(arrays).tobytes() == b"".join(array.tobytes() for array in arrays)
