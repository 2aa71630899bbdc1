"""What autograd saves between a forward and its backward pass, in bytes."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class SavedTensors(torch.autograd.graph.saved_tensors_hooks):
    """While this is active, collects what is saved for the backward pass; several views of one storage count once.

    without: tensors that are there in any case, such as parameters. Works for tensors of every device, and for fake
    ones, which have no address.
    """

    def __init__(self, without: Iterable[Tensor] = ()) -> None:
        super().__init__(self._pack, lambda tensor: tensor)
        self._without = {_storage(tensor) for tensor in without}
        self._storages: dict[int, int] = {}

    @property
    def nbytes(self) -> int:
        """Bytes saved so far."""
        return sum(self._storages.values())

    def _pack(self, tensor: Tensor) -> Tensor:
        # A storage that is saved lives on with the graph: its number is not given away again meanwhile.
        if (number := _storage(tensor)) not in self._without:
            self._storages[number] = tensor.untyped_storage().nbytes()
        return tensor


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
