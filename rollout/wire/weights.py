"""Weight versions on the wire: what the learner publishes, and how an engine proves that it holds it.

A version is published as a manifest (name, dtype, shape and checksum of every tensor, and a probe) and a handle to its
bytes. It has all of a model's tensors, or a low-rank adapter for weights that engines hold. The bytes are in a file in
memory, in Ray's object store, or in plain arrays within one process. Opening a handle returns one read-only uint8 array
per tensor, in the manifest's order, without a copy. A delta (delta.py) may be published beside the whole version.
"""

from __future__ import annotations

import importlib
import os
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, astuple, dataclass, replace
from math import prod
from typing import Any

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from rollout.wire.adapter import AdapterSpec
from rollout.wire.policies import POLICY

ByteArray = NDArray[np.uint8]

_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}
_THREADED_BYTES = 1 << 20  # blake3 gains from threads only on large inputs


class WeightMismatch(RuntimeError):
    """An engine does not hold what the learner published; the message names the tensor or the probe."""


class TransferFailed(RuntimeError):
    """An engine could not take part in a transfer from GPU to GPU; the message names it."""


class TransferStuck(RuntimeError):
    """The learner cannot end a transfer that has failed, and must start again."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of a version, by its Hugging Face checkpoint name."""

    name: str
    dtype: str  # torch's name without the prefix, e.g. "bfloat16", which numpy lacks
    shape: tuple[int, ...]
    checksum: str  # blake3 of the bytes, hex; empty for transfers from GPU to GPU

    @property
    def word_bytes(self) -> int:
        """Bytes of one number."""
        return _ITEM_BYTES[self.dtype]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.word_bytes


PROBE_TOKENS = 32  # of the text that proves a sync


@dataclass(frozen=True, slots=True)
class Probe:
    """A fixed token sequence and the logprobs the learner gives it: the end-to-end check of a sync.

    logprobs[i] belongs to token_ids[i + 1]. `tolerance` bounds the mean absolute difference, in nats.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    tolerance: float

    def check(
        self,
        engine: str,
        version: int,
        logprobs: Sequence[float] | NDArray[np.floating[Any]],
        coarseness: float = 1.0,
    ) -> float:
        """Return the mean absolute difference to the learner's logprobs, or raise `WeightMismatch` beyond tolerance.

        coarseness: how much coarser than the published type the engine rounds; movements grow in proportion.
        """
        difference = float(np.abs(np.asarray(logprobs) - np.asarray(self.logprobs)).mean())
        allowed = coarseness * self.tolerance
        if not difference <= allowed:  # NaN fails too
            raise WeightMismatch(
                f"{engine}: after the sync to version {version} the probe's logprobs differ from the learner's by "
                f"{difference:.3g} nats on average (allowed {allowed:.3g}); it computes with other weights"
            )
        return difference


@dataclass(frozen=True, slots=True)
class WeightManifest:
    """What an engine must prove about a version."""

    version: int
    tensors: tuple[TensorSpec, ...]
    probe: Probe
    adapter: AdapterSpec | None = None  # the tensors are this adapter's; None: the whole model
    policy: str = POLICY  # of the run

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.tensors)

    @property
    def sizes(self) -> list[int]:
        """Bytes of each tensor."""
        return [spec.nbytes for spec in self.tensors]

    @property
    def digest(self) -> str:
        """Identity of the tensors' contents, whatever the version's number: blake3 over their specs, hex."""
        return blake3(repr([astuple(spec) for spec in self.tensors]).encode()).hexdigest()

    def require_policy(self, policy: str, engine: str) -> None:
        """Raise WeightMismatch for a version of another policy than the engine serves; called before loading."""
        if self.policy != policy:
            raise WeightMismatch(
                f"{engine}: version {self.version} is of policy {self.policy!r}, but the engine serves {policy!r}"
            )

    def require_names(self, expected: Iterable[str], engine: str) -> None:
        """Raise WeightMismatch unless the tensor names are exactly the checkpoint's; called before loading."""
        published = {spec.name for spec in self.tensors}
        wanted = set(expected)
        if missing := sorted(wanted - published):
            raise WeightMismatch(
                f"{engine}: version {self.version} lacks tensor {missing[0]} ({len(missing)} missing)"
            )
        if unknown := sorted(published - wanted):
            raise WeightMismatch(f"{engine}: version {self.version} has unknown tensor {unknown[0]}")


@dataclass(frozen=True, slots=True)
class Handle:
    """Address of a version's bytes. `opener` is "module:function"; it is called with `address` and the tensors' sizes
    in bytes, and returns one uint8 array per tensor.

    The indirection keeps this module, and vLLM's worker process, free of Ray.
    """

    opener: str
    address: Any

    def open(self, sizes: Sequence[int]) -> list[ByteArray]:
        module, _, function = self.opener.partition(":")
        arrays: list[ByteArray] = getattr(importlib.import_module(module), function)(self.address, sizes)
        return arrays


@dataclass(frozen=True, slots=True)
class Delta:
    """A version's difference to another, see delta.py; `handle` opens to one array per tensor, of these sizes."""

    base: str  # digest of the version that it is applied to
    handle: Handle
    sizes: tuple[int, ...]  # bytes


@dataclass(frozen=True, slots=True)
class WeightUpdate:
    """One published version: its manifest, the handle to its bytes, and a delta for holders of the version before."""

    manifest: WeightManifest
    handle: Handle
    delta: Delta | None = None
    verified: bool = False  # the bytes of this handle, by a process of this node

    @property
    def version(self) -> int:
        return self.manifest.version

    def to_plain(self) -> dict[str, Any]:
        """Convert to dicts, lists and strings for vLLM's control plane (the address must be a string); no delta."""
        return asdict(replace(self, delta=None))

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> WeightUpdate:
        manifest, probe = plain["manifest"], plain["manifest"]["probe"]
        specs = tuple(
            TensorSpec(t["name"], t["dtype"], tuple(t["shape"]), t["checksum"]) for t in manifest["tensors"]
        )
        checked = Probe(tuple(probe["token_ids"]), tuple(probe["logprobs"]), probe["tolerance"])
        low_rank = manifest["adapter"]
        adapter = low_rank and AdapterSpec(low_rank["rank"], low_rank["alpha"], tuple(low_rank["layers"]))
        whole = WeightManifest(manifest["version"], specs, checked, adapter, manifest["policy"])
        return cls(whole, Handle(**plain["handle"]))

    def tensors(self) -> Iterator[tuple[TensorSpec, ByteArray]]:
        """Yield the tensors' specs and bytes (read-only, zero-copy), in the manifest's order.

        Raises WeightMismatch, naming the tensor, where the payload's size differs from the manifest's.
        """
        specs = self.manifest.tensors
        arrays = self.handle.open(self.manifest.sizes)
        for position, spec in enumerate(specs):
            if position >= len(arrays):
                raise WeightMismatch(
                    f"version {self.version}: tensor {spec.name} is missing from the payload"
                )
            if arrays[position].nbytes != spec.nbytes:
                raise WeightMismatch(
                    f"version {self.version}: tensor {spec.name} has {arrays[position].nbytes} bytes, not {spec.nbytes}"
                )
            yield spec, arrays[position]

    def verify(self) -> None:
        """Compare every tensor's bytes with its checksum; WeightMismatch names the first that differs.

        Returns at once if another process of this node has done so for this very memory (verdicts.py).
        """
        if self.verified:
            return
        for spec, array in self.tensors():
            if checksum(array) != spec.checksum:
                raise WeightMismatch(
                    f"version {self.version}: tensor {spec.name} arrived with another checksum"
                )


@dataclass(frozen=True, slots=True)
class SyncReport:
    """An engine's acknowledgement of one version."""

    engine: str
    version: int
    tensors: int  # how many were checked and loaded
    probe_difference: float  # mean |logprob difference| on the probe, nats
    seconds: float  # the whole sync, measured by the engine
    seconds_stalled: float  # while generation was paused


def checksum(array: ByteArray) -> str:
    """Compute blake3 of an array's bytes, hex; large arrays are hashed on all cores."""
    threads = blake3.AUTO if array.nbytes > _THREADED_BYTES else 1
    return blake3(array.data, max_threads=threads).hexdigest()


def inline(arrays: Sequence[ByteArray]) -> Handle:
    """Return a handle to arrays of this process; engines must copy them before the learner's next step."""
    return Handle("rollout.wire.weights:open_inline", list(arrays))


def open_inline(address: Any, sizes: Sequence[int]) -> list[ByteArray]:
    del sizes
    return list(address)


class MemoryFile:
    """An anonymous file in memory; the kernel frees it with the last process that holds or maps it."""

    def __init__(self, name: str) -> None:
        self._descriptor = os.memfd_create(name)
        weakref.finalize(self, os.close, self._descriptor)

    @property
    def path(self) -> str:
        """Path at which processes of this user on this machine open it, while this object exists."""
        return f"/proc/{os.getpid()}/fd/{self._descriptor}"

    @property
    def handle(self) -> Handle:
        """Handle to the arrays that lie in it back to back."""
        return Handle("rollout.wire.weights:open_file", self.path)


def write_memory(arrays: Sequence[ByteArray]) -> tuple[Handle, MemoryFile]:
    """Write the arrays back to back into memory that any process of this user on this machine can map.

    The caller keeps the file until every engine has acknowledged; existing maps stay valid.
    """
    file = MemoryFile("manta-weights")
    with open(file.path, "wb") as writing:
        for array in arrays:
            writing.write(array.data)
    return file.handle, file


def open_file(address: str, sizes: Sequence[int]) -> list[ByteArray]:
    """Map the file; a short file gives short arrays, which `WeightUpdate.tensors` refuses by name."""
    return parts(np.memmap(address, dtype=np.uint8, mode="r"), sizes)


def parts(whole: ByteArray, sizes: Sequence[int]) -> list[ByteArray]:
    """Return views of consecutive parts of a buffer; they are short where it is."""
    ends = np.cumsum(sizes)
    return [whole[end - size : end] for size, end in zip(sizes, ends, strict=True)]


def joined(arrays: Sequence[ByteArray]) -> ByteArray:
    """Concatenate the bytes of all arrays, without a copy if they are the consecutive parts of one buffer."""
    whole = arrays[0].base
    if isinstance(whole, np.ndarray) and whole.dtype == np.uint8:
        ends = np.cumsum([array.nbytes for array in arrays])
        begins = whole.ctypes.data + np.concatenate([[0], ends])
        if [array.ctypes.data for array in arrays] == begins[:-1].tolist() and ends[-1] == whole.nbytes:
            return whole
    return np.concatenate(arrays)
