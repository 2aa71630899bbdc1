"""A module that learns beside the policy, such as a value head: whole on one rank, sharded over several.

Beside an adapter it is whole on every rank, as the adapter is: one optimizer moves both.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from learner.parallel.ranks import Ranks
from learner.parallel.shards import Stored, laid_out, local, shard, sum_whole


class AuxiliaryModule:
    """The module, called as it is. On several ranks every call and every change of its state is collective.

    All ranks must make it with the same values. Ranks of a context group call it with the same, of whole rows. whole:
    every rank holds all of it, and sums gradients by `sum_gradients`.
    """

    def __init__(self, module: nn.Module, ranks: Ranks, device: torch.device, whole: bool = False) -> None:
        self.module = module
        self._ranks, self._whole = ranks, whole
        self._sharded = None if whole else shard(module, ranks, alike=ranks.context.size)
        if self._sharded is None:  # shards are moved one by one
            module.to(device)

    def __call__(self, *given: Any) -> Any:
        """What the module computes; of several ranks' micro-batches each has its own."""
        return (
            self.module(*given) if self._sharded is None else self._sharded.use(lambda: self.module(*given))
        )

    def parameters(self) -> Iterator[nn.Parameter]:
        """Its parameters, always in the same order."""
        return self.module.parameters()

    def sum_gradients(self) -> None:
        """Sum the gradients over the ranks, after the backward pass of all rows, which does so for sharded ones."""
        if self._whole:
            gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
            sum_whole(gradients, self._ranks)
            for gradient in gradients:  # ranks of a context group have the same
                gradient /= self._ranks.context.size

    def follow(self, other: AuxiliaryModule, rate: float) -> None:
        """Move towards a module of the same shape: see `follow`."""
        follow(self.module, other.module, rate)

    def state(self) -> dict[str, Tensor]:
        """Its tensors by name, sharded where they are."""
        return dict(self.module.state_dict())

    def load(self, stored: Mapping[str, Stored]) -> None:
        """Read tensors of the same names, of sharded ones the own rows."""
        own = self.module.state_dict()
        self.module.load_state_dict({name: laid_out(stored[name], like) for name, like in own.items()})


@torch.no_grad()
def follow(slow: nn.Module, fast: nn.Module, rate: float) -> None:
    """Move each parameter towards that of a module of the same shape, by a share of the way: Polyak averaging.

    What does not learn is the same in both.
    """
    for own, followed in zip(slow.parameters(), fast.parameters(), strict=True):
        if followed.requires_grad:
            local(own).lerp_(local(followed), rate)
