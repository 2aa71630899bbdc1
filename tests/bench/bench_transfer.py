"""Weight bytes through Ray's object store against a plain memory copy of the same bytes; prints JSON.

One actor holds a snapshot of about 1 GB in bfloat16 and puts it into the store; another opens the handle and copies
every tensor into one it has, as an engine does. The yardstick is torch's copy of the same tensors between two ordinary
buffers in that second actor, on as many threads. Both in turns, warm. Checksums are timed beside it, on their own.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from math import prod
from typing import Any

import ray
import torch

from learner.training.publish import Staging, write
from rollout.wire.actors import put_object
from rollout.wire.weights import ByteArray, Handle, checksum

THREADS, ROUNDS, WARM_UP = 1, 9, 4
STORE_BYTES = 5 << 30
LAYERS, WIDTH, MLP, KEYS, VOCABULARY = 24, 1024, 2816, 256, 152_064


def _shapes() -> list[tuple[int, ...]]:
    """A decoder of half a billion parameters: embeddings, then per layer attention, feed-forward and two norms."""
    layer = [(WIDTH, WIDTH), (KEYS, WIDTH), (KEYS, WIDTH), (WIDTH, WIDTH)]
    layer += [(MLP, WIDTH), (MLP, WIDTH), (WIDTH, MLP), (WIDTH,), (WIDTH,)]
    return [(VOCABULARY, WIDTH), *layer * LAYERS, (WIDTH,), (8, WIDTH, WIDTH)]


def _tensors() -> list[torch.Tensor]:
    return [torch.full(shape, 0.5, dtype=torch.bfloat16) for shape in _shapes()]


def _bytes(tensor: torch.Tensor) -> ByteArray:
    array: ByteArray = tensor.view(-1).view(torch.uint8).numpy()
    return array


class Holder:
    """The learner's place: it has a snapshot's buffer and brings it to where the engine finds it."""

    def __init__(self, receiver: Any) -> None:
        self._receiver = receiver
        tensors = _tensors()
        self._arrays = Staging().parts([tensor.nbytes for tensor in tensors])
        for array, tensor in zip(self._arrays, tensors, strict=True):
            write(array, tensor, torch.bfloat16)

    def stamp(self, version: int) -> None:
        """Mark every tensor, so that a stale one is seen."""
        for array in self._arrays:
            array[:2] = torch.tensor([version], dtype=torch.bfloat16).view(torch.uint8).numpy()

    def sync(self) -> dict[str, float]:
        """Put the bytes, have them received, and drop them; seconds of the parts and of the whole."""
        began = time.perf_counter()
        handle, _keep_alive = put_object(self._arrays)
        put = time.perf_counter() - began
        received: float = ray.get(self._receiver.receive.remote(handle))
        return {"put": put, "receive": received, "sync": time.perf_counter() - began}


class Receiver:
    """An engine's place: it has tensors of those shapes and copies what arrives into them."""

    def __init__(self) -> None:
        torch.set_num_threads(THREADS)
        self._own, self._source = _tensors(), _tensors()
        self._sizes = [tensor.nbytes for tensor in self._own]

    def receive(self, handle: Handle) -> float:
        """Open and copy; returns the seconds it took."""
        began = time.perf_counter()
        arrays = handle.open(self._sizes)
        for tensor, array in zip(self._own, arrays, strict=True):
            tensor.view(-1).view(torch.uint8).copy_(_as_torch(array))
        return time.perf_counter() - began

    def held(self) -> set[float]:
        """The first number of every tensor: the version."""
        return {float(tensor.view(-1)[0]) for tensor in self._own}

    def copy_plainly(self) -> float:
        """Seconds for the same bytes from one buffer of this process to another."""
        return _seconds(
            lambda: [to.copy_(source) for to, source in zip(self._own, self._source, strict=True)]
        )

    def hash(self) -> float:
        """Seconds for the checksums of all tensors."""
        return _seconds(lambda: [checksum(_bytes(tensor)) for tensor in self._own])


def _as_torch(array: ByteArray) -> torch.Tensor:
    return torch.frombuffer(memoryview(array), dtype=torch.uint8)


def _seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _one_round(holder: Any, receiver: Any, version: int) -> dict[str, float]:
    plain = ray.get(receiver.copy_plainly.remote())
    ray.get(holder.stamp.remote(version))
    seconds = ray.get(holder.sync.remote())
    held = ray.get(receiver.held.remote())
    if held != {float(version)}:
        raise RuntimeError(f"sync {version}: the receiver holds versions {held}")
    return {"plain": plain} | seconds


def main() -> dict[str, float]:
    """Median bytes per second of a sync and of a plain copy, and their ratio (target: at least 0.5)."""
    ray.init(address="local", num_cpus=2, object_store_memory=STORE_BYTES, include_dashboard=False,
             log_to_driver=False, logging_level="ERROR")  # fmt: skip
    try:
        receiver = ray.remote(Receiver).remote()
        holder = ray.remote(Holder).remote(receiver)
        rounds = [_one_round(holder, receiver, version) for version in range(1, WARM_UP + ROUNDS + 1)]
        hashing = [ray.get(receiver.hash.remote()) for _ in range(3)]
    finally:
        ray.shutdown()
    first, warm = rounds[0], rounds[WARM_UP:]
    gigabytes = sum(2 * prod(shape) for shape in _shapes()) / 1e9
    rates = {part: gigabytes / statistics.median(one[part] for one in warm) for part in first}
    return {
        "gigabytes": round(gigabytes, 3),
        "ratio": round(statistics.median(one["plain"] / one["sync"] for one in warm), 3),
        "first_sync_ratio": round(first["plain"] / first["sync"], 3),
        "checksum_gb_per_s": round(gigabytes / statistics.median(hashing), 2),
    } | {f"{part}_gb_per_s": round(rate, 2) for part, rate in rates.items()}


if __name__ == "__main__":
    print(json.dumps(main()))
