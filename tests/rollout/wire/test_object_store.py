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

ON_TWO_NODES = """
import json, ray
import numpy as np
from ray.cluster_utils import Cluster
from ray.experimental import get_object_locations
from rollout.wire.actors import put_object
from rollout.wire.actors import node_file
from rollout.wire.delta import encoded
from rollout.wire.held_version import HeldVersion
from rollout.wire.weights import Delta, Probe, TensorSpec, WeightManifest, WeightUpdate, checksum

class Worker:
    def __init__(self): self.held = HeldVersion(node_file("versions"))
    def sync(self, update):
        received = self.held.receive(update)
        self.held.loaded()
        return [array.sum(dtype=int).item() for _, array in received.tensors()]

def manifest(version, arrays):
    specs = [TensorSpec(f"t{n}", "bfloat16", (a.nbytes // 2,), checksum(a)) for n, a in enumerate(arrays)]
    return WeightManifest(version, tuple(specs), Probe((), (), 0.0))

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
far = cluster.add_node(num_cpus=1, resources={"far": 1}).node_id
ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
worker = ray.remote(Worker).options(resources={"far": 1}).remote()
old = [np.full(size, 1, dtype=np.uint8) for size in (400_000, 300_000)]
new = [array.copy() for array in old]
for array in new:
    array[1000] = 2
first, kept = put_object(old)
found = [ray.get(worker.sync.remote(WeightUpdate(manifest(0, old), first)))]
differences = [encoded(a, b, 2) for a, b in zip(old, new, strict=True)]
whole, whole_kept = put_object(new)
shorter, shorter_kept = put_object(differences)
delta = Delta(manifest(0, old).digest, shorter, tuple(each.nbytes for each in differences))
found.append(ray.get(worker.sync.remote(WeightUpdate(manifest(1, new), whole, delta))))
there = get_object_locations([kept, whole_kept, shorter_kept])
opened = [far in there[each]["node_ids"] for each in (kept, whole_kept, shorter_kept)]
print(json.dumps({"found": found, "opened": opened}))
ray.shutdown()
cluster.shutdown()
"""


def _told(script: str) -> dict[str, object]:
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, encoding="utf-8")
    told: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return told


@pytest.mark.slow
def test_another_node_fetches_the_delta_and_not_the_whole_version() -> None:
    found = [[400_000, 300_000], [400_001, 300_001]]
    assert _told(ON_TWO_NODES) == {"found": found, "opened": [True, False, True]}


@pytest.mark.slow
def test_a_version_arrives_whole_and_lives_only_as_long_as_its_reference() -> None:
    assert _told(SCRIPT) == {"equal": True, "held": True, "held_after": False}


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
