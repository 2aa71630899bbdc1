"""What the learner publishes: its parameters as raw bytes with checksums, and the probe that proves a sync."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from learner.model.policy import Policy
from learner.model.tensor_files import memory_of
from learner.training.probe import probe_of
from rollout.wire.delta import encoded
from rollout.wire.weights import (
    ByteArray,
    SyncReport,
    TensorSpec,
    WeightManifest,
    checksum,
    parts,
)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One version, ready to be put somewhere: `arrays` are the consecutive parts of one buffer.

    For a `Publisher`, which needs no bytes, `arrays` is empty and so are the manifest's checksums. `differences` are
    those to the version with the digest `base`, one a tensor (rollout/wire/delta.py); empty without a delta.
    """

    manifest: WeightManifest
    arrays: tuple[ByteArray, ...]
    base: str = ""
    differences: tuple[ByteArray, ...] = ()


class Publisher(Protocol):
    """Sends the live parameters to engines itself and returns when all of them have proved that they hold them.

    The snapshot it is given has no bytes: copies on the host would be made for nothing. workers: handles of the
    engines' actors, by name. Raises TransferFailed and TransferStuck, once all tensors were taken from the parameters.
    """

    async def publish(self, snapshot: Snapshot, workers: Mapping[str, Any]) -> Sequence[SyncReport]: ...


class Staging:
    """The host buffer that versions are written to, one after the other.

    It is made once, since touching a gigabyte of new memory takes longer than casting the weights into it; and all
    tensors lie back to back, since one run of bytes is put into an object store faster than hundreds. Beside a GPU it
    is pinned, so that the device copies into it by itself. `digest` is that of the version in it, empty before the
    first and while one is written.
    """

    def __init__(self) -> None:
        self.digest = ""
        self._whole: ByteArray = np.empty(0, dtype=np.uint8)

    def parts(self, sizes: Sequence[int]) -> list[ByteArray]:
        """Room for tensors of so many bytes, which the next version overwrites."""
        self.digest = ""
        if sum(sizes) != self._whole.nbytes:
            room = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=torch.cuda.is_available())
            self._whole = room.numpy()
        return parts(self._whole, sizes)


def write(array: ByteArray, tensor: torch.Tensor, dtype: torch.dtype) -> None:
    """Copy a tensor into its part of a staging buffer, cast; from a GPU the copy is only begun."""
    torch.from_numpy(array).view(dtype).view(tensor.shape).copy_(tensor, non_blocking=True)


def write_compared(array: ByteArray, tensor: torch.Tensor, dtype: torch.dtype) -> ByteArray:
    """As `write`; returns the difference to what was overwritten, or the part where that is no longer."""
    cast = tensor.to(device="cpu", dtype=dtype).contiguous()
    new: ByteArray = np.frombuffer(memory_of(cast), dtype=np.uint8)
    difference = encoded(array, new, dtype.itemsize)
    array[:] = new
    return array if difference is None else difference


def take_snapshot(
    policy: Policy,
    version: int,
    dtype: str,
    with_bytes: bool = True,
    staging: Staging | None = None,
    delta: bool = False,
) -> Snapshot:
    """What the policy publishes as an engine of `dtype` needs it, with checksums and the learner's probe logprobs.

    `with_bytes=False` leaves out bytes and checksums, and with them every copy to the host. `staging` is reused: the
    next snapshot overwrites this one. Without it the snapshot has a buffer of its own. `delta` adds the differences to
    the snapshot before, where they are shorter. Every rank has to take it; the bytes are rank 0's alone. Beside its
    share and the buffer a rank holds one layer at a time.
    """
    engine_dtype: torch.dtype = getattr(torch, dtype)
    adapter, shapes, tensors = policy.published(engine_dtype)
    arrays: list[ByteArray] = []
    differences: list[ByteArray] = []
    staging = staging or Staging()
    base = staging.digest if delta else ""
    if with_bytes and policy.ranks.rank:
        for _ in tensors:  # gathered together with rank 0
            pass
        with_bytes = False
    if with_bytes:
        arrays = staging.parts([shape.numel() * engine_dtype.itemsize for _, shape in shapes])
        for array, (_, tensor) in zip(arrays, tensors, strict=True):
            if base:
                differences.append(write_compared(array, tensor, engine_dtype))
            else:
                write(array, tensor, engine_dtype)
        if policy.device.type == "cuda":
            torch.cuda.synchronize(policy.device)
    sums = [checksum(array) for array in arrays] if with_bytes else [""] * len(shapes)
    specs = [
        TensorSpec(name, dtype, tuple(shape), sum_) for (name, shape), sum_ in zip(shapes, sums, strict=True)
    ]
    manifest = WeightManifest(version, tuple(specs), probe_of(policy, dtype), adapter)
    staging.digest = manifest.digest if with_bytes else ""
    if sum(each.nbytes for each in differences) == manifest.nbytes:
        differences = []
    return Snapshot(manifest, tuple(arrays), base if differences else "", tuple(differences))
