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

    For a `Publisher`, which needs no bytes, `arrays` is empty and so are the manifest's checksums.
    """

    manifest: WeightManifest
    arrays: tuple[ByteArray, ...]


class Publisher(Protocol):
    """Sends the live parameters to every engine itself and returns when all of them have proved that they hold them.

    The snapshot it is given has no bytes: copies on the host would be made for nothing.
    """

    async def publish(self, snapshot: Snapshot) -> Sequence[SyncReport]: ...


class Staging:
    """The host buffer that versions are written to, one after the other.

    It is made once, since touching a gigabyte of new memory takes longer than casting the weights into it; and all
    tensors lie back to back, since one run of bytes is put into an object store faster than hundreds.
    """

    def __init__(self) -> None:
        self._whole: ByteArray = np.empty(0, dtype=np.uint8)

    def write(self, tensors: Sequence[torch.Tensor], dtype: torch.dtype) -> list[ByteArray]:
        """Cast and copy the tensors, each gathered by itself; the parts returned are overwritten by the next call."""
        sizes = [tensor.numel() * dtype.itemsize for tensor in tensors]
        if sum(sizes) != self._whole.nbytes:
            self._whole = np.empty(sum(sizes), dtype=np.uint8)
        arrays = parts(self._whole, sizes)
        for tensor, array in zip(tensors, arrays, strict=True):
            torch.from_numpy(array).view(dtype).view(tensor.shape).copy_(gathered(tensor))
        return arrays


def take_snapshot(
    policy: Policy, version: int, dtype: str, with_bytes: bool = True, staging: Staging | None = None
) -> Snapshot:
    """What the policy publishes as an engine of `dtype` needs it, with checksums and the learner's probe logprobs.

    `with_bytes=False` leaves out bytes and checksums, and with them every copy to the host. `staging` is reused: the
    next snapshot overwrites this one. Without it the snapshot has a buffer of its own. Every rank has to take it; the
    bytes are rank 0's alone.
    """
    adapter, named = policy.published()
    names, tensors = zip(*((name, tensor.detach()) for name, tensor in named), strict=True)
    if policy.ranks.rank and with_bytes:
        with_bytes = False
        for tensor in tensors:
            gathered(tensor)
    arrays = (staging or Staging()).write(tensors, getattr(torch, dtype)) if with_bytes else []
    sums = [checksum(array) for array in arrays] if with_bytes else [""] * len(names)
    specs = [
        TensorSpec(name, dtype, tuple(tensor.shape), sum_)
        for name, tensor, sum_ in zip(names, tensors, sums, strict=True)
    ]
    return Snapshot(WeightManifest(version, tuple(specs), probe_of(policy, dtype), adapter), tuple(arrays))
