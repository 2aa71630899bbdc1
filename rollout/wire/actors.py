"""Ray's object store as a place where weights lie."""

from __future__ import annotations

import base64
from collections.abc import Sequence

import ray

from rollout.wire.weights import ByteArray, Handle, joined, parts


def put_object(arrays: Sequence[ByteArray]) -> tuple[Handle, ray.ObjectRef]:
    """Put the arrays into the object store as one run of bytes: one copy for every engine of a host.

    The caller keeps the reference until every engine has acknowledged; the handle alone does not keep the object alive.
    """
    reference = ray.put(joined(arrays))
    cluster = ray.get_runtime_context().gcs_address
    packed = base64.b64encode(ray.cloudpickle.dumps(reference)).decode()
    # Ray keeps for ever what is pickled outside of its own calls, which would be every version of a run. The caller's
    # reference is the one that counts, so what Ray has just added is taken back.
    ray._private.worker.global_worker.core_worker.remove_object_ref_reference(reference)
    return Handle("rollout.wire.actors:open_object", f"{cluster} {packed}"), reference


def open_object(address: str, sizes: Sequence[int]) -> list[ByteArray]:
    """Map the arrays where they lie: read-only views of the object store's memory.

    vLLM's worker process is no Ray process: the first call there joins the cluster (about 0.1 s, once).
    """
    cluster, _, packed = address.partition(" ")
    if not ray.is_initialized():
        ray.init(address=cluster, log_to_driver=False, logging_level="ERROR")
    return parts(ray.get(ray.cloudpickle.loads(base64.b64decode(packed)), timeout=60), sizes)
