"""What the learner publishes: its parameters as raw bytes with checksums, and the probe that proves a sync."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from learner.model import Policy
from rollout.wire.weights import ByteArray, Probe, SyncReport, TensorSpec, WeightManifest, checksum

PROBE_TOKENS = 32
# Mean |dlogprob| a sound sync may show, nats: float32 engines are measured at 1e-6, bfloat16 ones at 1e-3 to 6e-3.
PROBE_TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2, "float16": 2e-2}


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One version, ready to be put somewhere: `arrays` are views of live parameters where no cast was needed.

    For a publisher that needs no bytes, `arrays` is empty and so are the manifest's checksums.
    """

    manifest: WeightManifest
    arrays: tuple[ByteArray, ...]


class Publisher(Protocol):
    """Brings a snapshot to every engine and returns when all of them have proved that they hold it."""

    needs_bytes: (
        bool  # False: sends the live parameters itself, and copies on the host would be made for nothing
    )

    async def publish(self, snapshot: Snapshot) -> Sequence[SyncReport]: ...


def take_snapshot(policy: Policy, version: int, dtype: str, with_bytes: bool = True) -> Snapshot:
    """The policy's parameters as an engine of `dtype` needs them, with checksums and the learner's probe logprobs.

    `with_bytes=False` leaves out bytes and checksums, and with them every copy to the host.
    """
    target = getattr(torch, dtype)
    specs, arrays = [], []
    for name, tensor in policy.named_weights():
        if not with_bytes:
            specs.append(TensorSpec(name, dtype, tuple(tensor.shape), checksum=""))
            continue
        array = _as_bytes(tensor.detach().to(target).cpu())
        specs.append(TensorSpec(name, dtype, tuple(tensor.shape), checksum(array)))
        arrays.append(array)
    return Snapshot(WeightManifest(version, tuple(specs), _probe(policy, dtype)), tuple(arrays))


def _as_bytes(tensor: torch.Tensor) -> ByteArray:
    array: ByteArray = tensor.contiguous().view(-1).view(torch.uint8).numpy()
    return array


def _probe(policy: Policy, dtype: str) -> Probe:
    # Drawn over the whole vocabulary, always the same: no part of the embedding is out of reach for long texts only.
    token_ids = np.random.default_rng(0).integers(0, policy.vocab_size, PROBE_TOKENS).tolist()
    logprobs = policy.score_ids(token_ids).tolist()
    return Probe(tuple(token_ids), tuple(logprobs), PROBE_TOLERANCE[dtype])
