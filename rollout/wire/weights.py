"""Weight versions on the wire: what the learner publishes and how an engine knows that it holds it.

A version is published as a manifest (name, dtype, shape and checksum of every tensor, and a probe) and a handle that
says where the bytes lie. It is all of a model's tensors, or a low-rank adapter on weights that engines hold. Whoever
hosts the ring decides where the bytes lie: a file in memory, Ray's object store, or plain arrays in one process.
Opening a handle gives one read-only uint8 array a tensor, in the manifest's order, without a copy.
"""

from __future__ import annotations

import importlib
import os
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from rollout.wire.adapter import AdapterSpec

ByteArray = NDArray[np.uint8]

_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}
_THREADED_BYTES = 1 << 20  # blake3 gains from threads only on large inputs


class WeightMismatch(RuntimeError):
    """An engine does not hold what the learner published; the message names the tensor or the probe."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of a version, by its Hugging Face checkpoint name."""

    name: str
    dtype: str  # torch's name without the prefix, e.g. "bfloat16": numpy has no word for it
    shape: tuple[int, ...]
    checksum: str  # blake3 of the bytes, hex; empty where they went from GPU to GPU and nobody saw them

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * _ITEM_BYTES[self.dtype]


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
        self, engine: str, version: int, logprobs: Sequence[float] | NDArray[np.floating[Any]]
    ) -> float:
        """Return the mean absolute difference to the learner's logprobs, or raise `WeightMismatch` beyond tolerance."""
        difference = float(np.abs(np.asarray(logprobs) - np.asarray(self.logprobs)).mean())
        # written so that NaN fails too
        if not difference <= self.tolerance:
            raise WeightMismatch(
                f"{engine}: after the sync to version {version} the probe's logprobs differ from the learner's by "
                f"{difference:.3g} nats on average (allowed {self.tolerance:.3g}); it computes with other weights"
            )
        return difference


@dataclass(frozen=True, slots=True)
class WeightManifest:
    """Everything an engine must be able to prove about a version."""

    version: int
    tensors: tuple[TensorSpec, ...]
    probe: Probe
    adapter: AdapterSpec | None = None  # what the tensors are, where they are not the whole model

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.tensors)

    def require_names(self, expected: Iterable[str], engine: str) -> None:
        """Refuse a version whose tensor names are not exactly the checkpoint's, before anything is loaded."""
        published = {spec.name for spec in self.tensors}
        wanted = set(expected)
        if missing := sorted(wanted - published):
            raise WeightMismatch(
                f"{engine}: version {self.version} lacks tensor {missing[0]} ({len(missing)} missing)"
            )
        if unknown := sorted(published - wanted):
            raise WeightMismatch(f"{engine}: version {self.version} brings unknown tensor {unknown[0]}")


@dataclass(frozen=True, slots=True)
class Handle:
    """Where the bytes of a version lie. `opener` is "module:function"; it is called with `address` and the manifest's
    tensor sizes in bytes, and returns one uint8 array a tensor.

    The indirection keeps this module (and vLLM's worker process, which opens the handle too) free of Ray.
    """

    opener: str
    address: Any

    def open(self, sizes: Sequence[int]) -> list[ByteArray]:
        module, _, function = self.opener.partition(":")
        arrays: list[ByteArray] = getattr(importlib.import_module(module), function)(self.address, sizes)
        return arrays


@dataclass(frozen=True, slots=True)
class WeightUpdate:
    """One published version: the manifest and where to get it."""

    manifest: WeightManifest
    handle: Handle

    @property
    def version(self) -> int:
        return self.manifest.version

    def to_plain(self) -> dict[str, Any]:
        """As dicts, lists and strings, for control planes that carry nothing else (the address must be a string)."""
        return asdict(self)

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> WeightUpdate:
        manifest, probe = plain["manifest"], plain["manifest"]["probe"]
        specs = tuple(
            TensorSpec(t["name"], t["dtype"], tuple(t["shape"]), t["checksum"]) for t in manifest["tensors"]
        )
        checked = Probe(tuple(probe["token_ids"]), tuple(probe["logprobs"]), probe["tolerance"])
        low_rank = manifest["adapter"]
        adapter = low_rank and AdapterSpec(low_rank["rank"], low_rank["alpha"], tuple(low_rank["layers"]))
        return cls(WeightManifest(manifest["version"], specs, checked, adapter), Handle(**plain["handle"]))

    def tensors(self) -> Iterator[tuple[TensorSpec, ByteArray]]:
        """The tensors' specs and bytes (read-only, zero-copy), in the manifest's order.

        Raises WeightMismatch when the payload holds fewer or more bytes than the manifest says, naming the tensor.
        """
        specs = self.manifest.tensors
        arrays = self.handle.open([spec.nbytes for spec in specs])
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
        """Compare every tensor's bytes with its checksum; WeightMismatch names the first that differs."""
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
    seconds: float  # the whole sync as the engine saw it
    seconds_stalled: float  # how long generation stood still


def checksum(array: ByteArray) -> str:
    """blake3 of an array's bytes, hex; large arrays are hashed on all cores."""
    threads = blake3.AUTO if array.nbytes > _THREADED_BYTES else 1
    return blake3(array.data, max_threads=threads).hexdigest()


def inline(arrays: Sequence[ByteArray]) -> Handle:
    """A handle to arrays of this very process; whoever opens it must copy before the learner's next step."""
    return Handle("rollout.wire.weights:open_inline", list(arrays))


def open_inline(address: Any, sizes: Sequence[int]) -> list[ByteArray]:
    del sizes
    return list(address)


class MemoryFile:
    """A file without a name, in memory: it is gone with the last process that holds or maps it, however that ends."""

    def __init__(self, name: str) -> None:
        self._descriptor = os.memfd_create(name)
        weakref.finalize(self, os.close, self._descriptor)

    @property
    def path(self) -> str:
        """Where processes of this user on this machine open it, while this object lives."""
        return f"/proc/{os.getpid()}/fd/{self._descriptor}"


def write_memory(arrays: Sequence[ByteArray]) -> tuple[Handle, MemoryFile]:
    """Write the arrays back to back into memory that any process of this user on this machine can map.

    The caller keeps the file until every engine has acknowledged; what is mapped by then stays so.
    """
    file = MemoryFile("manta-weights")
    with open(file.path, "wb") as writing:
        for array in arrays:
            writing.write(array.data)
    return Handle("rollout.wire.weights:open_file", file.path), file


def open_file(address: str, sizes: Sequence[int]) -> list[ByteArray]:
    """Map the file; a short file gives short arrays, which `WeightUpdate.tensors` reports by name."""
    return parts(np.memmap(address, dtype=np.uint8, mode="r"), sizes)


def parts(whole: ByteArray, sizes: Sequence[int]) -> list[ByteArray]:
    """Views of consecutive parts of a buffer; where it is too short, so are they."""
    ends = np.cumsum(sizes)
    return [whole[end - size : end] for size, end in zip(sizes, ends, strict=True)]


def joined(arrays: Sequence[ByteArray]) -> ByteArray:
    """The bytes of all arrays back to back: no copy where they are the consecutive parts of one buffer."""
    whole = arrays[0].base
    if isinstance(whole, np.ndarray) and whole.dtype == np.uint8:
        ends = np.cumsum([array.nbytes for array in arrays])
        begins = whole.ctypes.data + np.concatenate([[0], ends])
        if [array.ctypes.data for array in arrays] == begins[:-1].tolist() and ends[-1] == whole.nbytes:
            return whole
    return np.concatenate(arrays)
