"""What the learner publishes: its parameters as raw bytes with checksums, and the probe that proves a sync."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from learner.model.policy import Policy
from learner.parallel.shards import gathered
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
    """Sends the live parameters to every engine itself and returns when all of them have proved that they hold them.

    The snapshot it is given has no bytes: copies on the host would be made for nothing.
    """

    async def publish(self, snapshot: Snapshot) -> Sequence[SyncReport]: ...


class Staging:
    """The host buffer that versions are written to, one after the other.

    It is made once, since touching a gigabyte of new memory takes longer than casting the weights into it; and all
    tensors lie back to back, since one run of bytes is put into an object store faster than hundreds. `digest` is that
    of the version in it, empty before the first and while one is written.
    """

    def __init__(self) -> None:
        self.digest = ""
        self._whole: ByteArray = np.empty(0, dtype=np.uint8)

    def write(self, tensors: Sequence[torch.Tensor], dtype: torch.dtype) -> list[ByteArray]:
        """Cast and copy the tensors, each gathered by itself; the parts returned are overwritten by the next call."""
        arrays = self._parts(tensors, dtype)
        for tensor, array in zip(tensors, arrays, strict=True):
            torch.from_numpy(array).view(dtype).view(tensor.shape).copy_(gathered(tensor))
        return arrays

    def write_compared(
        self, tensors: Sequence[torch.Tensor], dtype: torch.dtype
    ) -> tuple[list[ByteArray], list[ByteArray]]:
        """As `write`; also returns the differences to what was overwritten, or the new part where that is no longer."""
        arrays, differences = self._parts(tensors, dtype), []
        for tensor, array in zip(tensors, arrays, strict=True):
            cast = gathered(tensor).to(device="cpu", dtype=dtype).contiguous()
            new: ByteArray = cast.view(-1).view(torch.uint8).numpy()
            difference = encoded(array, new, dtype.itemsize)
            array[:] = new
            differences.append(array if difference is None else difference)
        return arrays, differences

    def _parts(self, tensors: Sequence[torch.Tensor], dtype: torch.dtype) -> list[ByteArray]:
        self.digest = ""
        sizes = [tensor.numel() * dtype.itemsize for tensor in tensors]
        if sum(sizes) != self._whole.nbytes:
            self._whole = np.empty(sum(sizes), dtype=np.uint8)
        return parts(self._whole, sizes)


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
    the snapshot before, where they are shorter. Every rank has to take it; the bytes are rank 0's alone.
    """
    adapter, named = policy.published()
    names, tensors = zip(*((name, tensor.detach()) for name, tensor in named), strict=True)
    if policy.ranks.rank and with_bytes:
        with_bytes = False
        for tensor in tensors:
            gathered(tensor)
    staging = staging or Staging()
    base = staging.digest if delta else ""
    arrays: list[ByteArray] = []
    differences: list[ByteArray] = []
    if with_bytes and base:
        arrays, differences = staging.write_compared(tensors, getattr(torch, dtype))
    elif with_bytes:
        arrays = staging.write(tensors, getattr(torch, dtype))
    sums = [checksum(array) for array in arrays] if with_bytes else [""] * len(names)
    specs = [
        TensorSpec(name, dtype, tuple(tensor.shape), sum_)
        for name, tensor, sum_ in zip(names, tensors, sums, strict=True)
    ]
    manifest = WeightManifest(version, tuple(specs), probe_of(policy, dtype), adapter)
    staging.digest = manifest.digest if with_bytes else ""
    if sum(each.nbytes for each in differences) == manifest.nbytes:
        differences = []
    return Snapshot(manifest, tuple(arrays), base if differences else "", tuple(differences))
