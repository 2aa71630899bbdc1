"""Where a learner's state is: on its device, or in host memory while engines have the device (`cluster.colocate`)."""

from __future__ import annotations

from learner.model.host_memory import HostMemory, device_bytes
from learner.training.learner import Learner


class DeviceState:
    """One rank's learner, whose weights, moments and frozen models move together.

    Gradients are dropped, as every step makes its own; buffers, which are small, stay.
    """

    def __init__(self, learner: Learner) -> None:
        self._learner = learner
        self._host = HostMemory()

    def offload(self) -> int:
        """Move everything to host memory; returns the bytes that were moved, 0 where it is there already."""
        if self._host.holds:
            return 0
        held = list(self._learner.held())
        for tensor in held:
            tensor.grad = None
        return self._host.take(held)

    def onload(self) -> int:
        """Move everything back to the device; returns the bytes that were moved."""
        return self._host.give_back()

    @property
    def device_bytes(self) -> int:
        """What lies on the device now, gradients aside."""
        return device_bytes(self._learner.held())

    def require_here(self) -> None:
        """Raise RuntimeError while the state is in host memory."""
        if self._host.holds:
            raise RuntimeError(
                "the learner's state is in host memory: engines have its device, call onload() first"
            )
