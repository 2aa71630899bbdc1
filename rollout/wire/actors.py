"""Weights in Ray's object store: publish once, map on every host."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path

import ray
import ray._private.worker

from rollout.wire.time_limits import NETWORK, limit
from rollout.wire.weights import ByteArray, Handle, joined, parts

_GET_SECONDS = 60.0


def put_object(arrays: Sequence[ByteArray]) -> tuple[Handle, ray.ObjectRef]:
    """Put the arrays into the object store as one run of bytes, shared by all engines of a host.

    The caller keeps the reference until every engine has acknowledged: the handle does not keep the object alive.
    """
    reference = ray.put(joined(arrays))
    cluster = ray.get_runtime_context().gcs_address
    packed = base64.b64encode(ray.cloudpickle.dumps(reference)).decode()
    # Ray never frees an object whose reference was pickled outside of its own calls. The caller's reference suffices,
    # so the one that Ray has just added is removed.
    ray._private.worker.global_worker.core_worker.remove_object_ref_reference(reference)
    return Handle("rollout.wire.actors:open_object", f"{cluster} {packed}"), reference


def open_object(address: str, sizes: Sequence[int]) -> list[ByteArray]:
    """Map the arrays without a copy: read-only views of the object store's memory.

    vLLM's worker is not a Ray process: the first call there connects it to the cluster (about 0.1 s, once).
    """
    cluster, _, packed = address.partition(" ")
    if not ray.is_initialized():
        ray.init(address=cluster, log_to_driver=False, logging_level="ERROR")
    reference = ray.cloudpickle.loads(base64.b64decode(packed))
    # The pull from another node is within this wait.
    return parts(ray.get(reference, timeout=limit(_GET_SECONDS, sum(sizes), NETWORK)), sizes)


def node_file(name: str) -> Path:
    """A file of this node's actors alone, which ends with Ray's session."""
    # Ray has no other way to ask for its folder. Nodes that share a machine share the folder, but not the store.
    folder = Path(ray._private.worker._global_node.get_session_dir_path())
    return folder / f"manta-{name}-{ray.get_runtime_context().get_node_id()}"
