"""Tensors that leave their device for a while: their bytes are kept in host memory, and the device's are given up.

Whole storages are moved, not tensors: a storage is copied, resized to nothing, and later resized and filled again. So
whatever refers to it (tied parameters, views that sharding has made, an optimizer's state) stays what it is. On a CPU
the device is the host itself: the same happens, and nothing is gained.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, UntypedStorage

from learner.parallel.shards import local


def device_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes that the storages of these tensors have on their device now, those of several tensors once."""
    return sum(storage.nbytes() for storage in _storages(tensors))


class HostMemory:
    """Room in host memory for what is away, pinned beside a GPU. It is kept, since pinning takes long."""

    def __init__(self) -> None:
        self._room = torch.empty(0, dtype=torch.uint8)
        self._away: list[tuple[UntypedStorage, Tensor]] = []

    @property
    def holds(self) -> bool:
        """Whether anything is away."""
        return bool(self._away)

    @torch.no_grad()
    def take(self, tensors: Iterable[Tensor]) -> int:
        """Move what these tensors have on their device here; returns its bytes. They must not be used meanwhile."""
        if self._away:
            raise RuntimeError("what is in host memory already is to be moved there")
        storages = [storage for storage in _storages(tensors) if storage.nbytes()]
        sizes = [storage.nbytes() for storage in storages]
        on_gpu = any(storage.device.type == "cuda" for storage in storages)
        if sum(sizes) != len(self._room):
            self._room = torch.empty(0, dtype=torch.uint8)  # before the new one is made
            self._room = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=on_gpu)
        self._away = list(zip(storages, self._room.split(sizes), strict=True))
        for storage, kept in self._away:
            kept.copy_(_bytes(storage), non_blocking=True)
        if on_gpu:  # the copies were begun
            torch.cuda.synchronize()
        for storage in storages:
            storage.resize_(0)
        if on_gpu:
            torch.cuda.empty_cache()  # what torch keeps for itself is of no use to another process
        return sum(sizes)

    @torch.no_grad()
    def give_back(self) -> int:
        """Move everything back to its device, as it was to the bit; returns its bytes."""
        for storage, kept in self._away:
            storage.resize_(len(kept))
            _bytes(storage).copy_(kept, non_blocking=True)
        moved = sum(len(kept) for _, kept in self._away)
        if any(storage.device.type == "cuda" for storage, _ in self._away):
            torch.cuda.synchronize()
        self._away = []
        return moved


def _storages(tensors: Iterable[Tensor]) -> list[UntypedStorage]:
    """The storages of the own parts of tensors, each once."""
    own = [local(tensor.detach()).untyped_storage() for tensor in tensors]
    return list({storage._cdata: storage for storage in own}.values())


def _bytes(storage: UntypedStorage) -> Tensor:
    """A storage as a tensor of bytes, which shares it."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
