"""What a process of an engine copies out of a published version: its share of every tensor, once.

A version lies in memory that all processes of a node map. vLLM's loaders narrow each published tensor to the rows or
columns that the process needs and copy these into its layer; the tensors are handed to them unmoved, so that neither
host nor device memory ever has the rest. On the way to a device a share goes through pinned memory, chunk by chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_CHUNK_BYTES = 32 << 20  # of pinned memory, twice


class ShareCopies(TorchDispatchMode):
    """Within it, copies out of published tensors are counted, reported, and led through pinned memory.

    copied: called with a tensor's published name and the part of a parameter that its share was copied to. Only views
    of a published tensor count as it: what a loader has computed from one is copied unseen.
    """

    def __init__(self, copied: Callable[[str, Tensor], None], chunks: PinnedChunks) -> None:
        super().__init__()
        self.copied_bytes = 0
        self._copied = copied
        self._chunks = chunks
        self._published: dict[int, tuple[str, Tensor]] = {}  # by storage, which the tensor keeps alive

    def publish(self, name: str, tensor: Tensor) -> Tensor:
        """Note a published tensor, before it is loaded; returns it."""
        self._published[tensor.untyped_storage()._cdata] = name, tensor
        return tensor

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # vLLM also calls its loaders with parameters on "meta", to count what they would copy.
        if func is not torch.ops.aten.copy_.default or args[0].is_meta:
            return func(*args, **(kwargs or {}))
        target, source = args[:2]
        known = self._published.get(source.untyped_storage()._cdata)
        alike = (target.shape, target.dtype) == (source.shape, source.dtype)
        if known and alike and target.device.type != "cpu":
            self._chunks.copy(target, source)
        else:
            func(*args, **(kwargs or {}))
        if known:
            self.copied_bytes += source.nbytes
            self._copied(known[0], target)
        return target


class PinnedChunks:
    """Copies from pageable to device memory: the device reads one pinned buffer while the other one is filled.

    pinned: False where there is no GPU; the buffers are then ordinary memory, and a device's copy has ended when it is
    begun.
    """

    def __init__(self, chunk_bytes: int = _CHUNK_BYTES, pinned: bool = torch.cuda.is_available()) -> None:
        self._chunk_bytes = chunk_bytes
        self._pinned = pinned
        self._buffers: list[Tensor] = []
        self._read: list[torch.Event] = []  # by the device, one for each buffer
        self._next = 0

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Copy to a tensor of equal shape and dtype; the last chunks may still be under way on the current stream."""
        if source.nbytes > self._chunk_bytes:
            if len(source) == 1:
                self.copy(target[0], source[0])
                return
            rows = max(1, len(source) * self._chunk_bytes // source.nbytes)
            for begin in range(0, len(source), rows):
                self.copy(target[begin : begin + rows], source[begin : begin + rows])
            return
        staged = self._buffer(target.device)[: source.nbytes].view(source.dtype).view(source.shape)
        staged.copy_(source)
        target.copy_(staged, non_blocking=True)
        if self._pinned:
            self._read[self._next].record()
        self._next = 1 - self._next

    def _buffer(self, device: torch.device) -> Tensor:
        """The next buffer, once the device has read what was in it."""
        if not self._buffers:  # made at the first copy: a process without a device needs none
            size, pinned = self._chunk_bytes, self._pinned
            self._buffers = [torch.empty(size, dtype=torch.uint8, pin_memory=pinned) for _ in range(2)]
            self._read = [torch.Event(device) for _ in range(2)] if pinned else []
        if self._pinned:
            self._read[self._next].synchronize()
        return self._buffers[self._next]
