"""Context parallelism: the ranks of a context group compute one packed row together, each a slice of its tokens.

Ulysses (Jacobs et al. 2023, DeepSpeed-Ulysses, section 3): embedding, normalizations, perceptrons and head need no
other token, so that a rank computes them of its slice. Attention needs all tokens, but no other head: an all-to-all
before it gives every rank the whole row for an equal part of the heads, and one after it gives the slices back.

    own slice, all heads      [T / C, H]  -- all-to-all -->  [T, H / C]      whole row, own heads: attention
    own slice, all heads      [T / C, H]  <-- all-to-all --  [T, H / C]

Gradients go the same way back. What a loss needs of the whole row (logprobs) is gathered; every rank of the group then
computes the same loss, and its backward pass takes the own slice's part of that gradient. The sum over all ranks, which
sharded parameters take anyway, is then the gradient of the row.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import lcm
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class ContextGroup:
    """The ranks that share a row; the default is this one alone, which has all of it."""

    def __init__(self, rank: int = 0, size: int = 1, group: dist.ProcessGroup | None = None) -> None:
        self.rank, self.size = rank, size
        self._group = group

    def lacking(self, tokens: int) -> int:
        """Tokens that a row is padded with, so that all slices are of one length."""
        return -tokens % self.size

    def length(self, tokens: int) -> int:
        """L: tokens of a slice of a row of so many."""
        return -(-tokens // self.size)

    def own(self, x_T: Tensor) -> Tensor:
        """The own slice [L, ...] of a row [T, ...], which is padded with its last token."""
        if self.size == 1:
            return x_T
        length = self.length(len(x_T))
        places_L = torch.arange(self.rank * length, (self.rank + 1) * length, device=x_T.device)
        return x_T.index_select(0, places_L.clamp_(max=len(x_T) - 1))

    def own_heads(self, *inputs: Tensor) -> list[Tensor]:
        """Queries, keys and values of all heads and the own slice, as those of the own heads and the whole row.

        [1, H, L, D] each -> [1, H / C, C L, D]. Key heads that C does not divide are repeated; their gradients are
        summed. Collective, with a collective backward pass.
        """
        apart = [self._apart(x[0].transpose(0, 1)) for x in inputs]
        exchanged_TF = _AllToAll.apply(torch.cat([x.flatten(2) for x in apart], 2), self).flatten(0, 1)
        parts = exchanged_TF.split([x.shape[2] * x.shape[3] for x in apart], 1)
        return [
            part.unflatten(1, x.shape[2:]).transpose(0, 1)[None] for part, x in zip(parts, apart, strict=True)
        ]

    def own_tokens(self, out: Tensor) -> Tensor:
        """The way back: attention's output of the own heads and the whole row, as that of all heads and the own slice.

        [1, C L, H / C, D] -> [1, L, H, D].
        """
        heads_CLHD = _AllToAll.apply(out[0].unflatten(0, (self.size, -1)), self)
        return heads_CLHD.transpose(0, 1).flatten(1, 2)[None]

    def gathered(self, own: Tensor, counts: Sequence[int]) -> Tensor:
        """The entries [M, ...] of all slices, in order of rank, from the own ones; counts: how many each rank has.

        A gradient of them goes to the own entries alone: every rank of the group must compute the same of what it gets.
        """
        if self.size == 1:
            return own
        found: Tensor = _Gathered.apply(own, tuple(counts), self.rank, self._group)
        return found

    def exchange(self, x: Tensor) -> Tensor:
        """Entry s of [C, ...] of rank r becomes entry r of rank s. Collective."""
        sent = x.contiguous()
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=self._group)
        return received

    def _apart(self, x_LHD: Tensor) -> Tensor:
        """[C, L, H / C, D]: what each rank of the group is to have."""
        heads = x_LHD.shape[1]
        repeats = lcm(heads, self.size) // heads
        repeated = x_LHD.repeat_interleave(repeats, 1) if repeats > 1 else x_LHD
        return repeated.unflatten(1, (self.size, -1)).transpose(0, 1)


class _AllToAll(torch.autograd.Function):
    """The exchange is its own inverse, and its own adjoint."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ContextGroup) -> Tensor:
        ctx.group = group
        return group.exchange(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.group.exchange(grad), None


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, own: Tensor, counts: tuple[int, ...], rank: int, group: dist.ProcessGroup | None
    ) -> Tensor:
        ctx.counts, ctx.rank = counts, rank
        padded = own.new_zeros((max(counts), *own.shape[1:]))
        padded[: len(own)] = own
        parts = [torch.empty_like(padded) for _ in counts]
        if len(padded):
            dist.all_gather(parts, padded, group=group)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return grad.split(ctx.counts)[ctx.rank], None, None, None
