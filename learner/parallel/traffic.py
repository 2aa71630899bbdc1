"""Bytes that the ranks of a learner exchange, told by the size of its model.

With P parameters and R ranks, sharded over S of them, each rank receives, and sends as much, (S - 1) / S of

    a packed row    P weights for the forward pass and P for the backward one, in the type of the products (FSDP2: a
                    layer at a time)
    gradients       P sums in float32, after each row or once an optimizer step
    a version       P weights in the engines' type, gathered a layer at a time to be published

Where C of the ranks compute a row together (context.py), tokens and heads of its slices travel too, for every attention
of the forward and of the backward pass (and of the forward pass again, where activations are recomputed).

An adapter's gradients are whole on every rank and summed once an optimizer step (an all-reduce: 2 (R - 1) / R of them);
its base has none, and is gathered to be published merged; in NF4 it is gathered as it is stored.

Where S < R, a sum of gradients is exchanged between the C = R / S ranks that hold the same part, too: 2 (C - 1) / C of
P / S sums.
"""

from __future__ import annotations

from dataclasses import dataclass

_SUM = 4  # bytes of a float32


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes that each rank receives: for a row, for sums of gradients beside the rows', for a version.

    across: of a sum of gradients, what comes from ranks of other copies of the model.
    """

    row: int
    sums: int
    version: int
    across: int

    @classmethod
    def of(
        cls,
        parameters: int,
        ranks: int,
        product_bytes: int,
        engine_bytes: int,
        once: bool = False,
        shards: int | None = None,
        adapter: int = 0,
        slices: int = 0,
        base_bytes: int | None = None,
    ) -> Traffic:
        """product_bytes: of a weight as products take it; engine_bytes: of one as engines do.

        once: gradients are summed once an optimizer step; shards: ranks that a parameter is sharded over, None: all.
        adapter: its parameters, where one is trained; slices: bytes of a row's slices that come from other ranks.
        base_bytes: of an adapter's base as it is stored; None: as products take it.
        """
        shards = shards or ranks
        copies, own = ranks // shards, parameters // shards
        if adapter:
            base = product_bytes * parameters if base_bytes is None else base_bytes
            gathered = base // shards * (shards - 1)
            sums = 2 * _SUM * adapter * (ranks - 1) // ranks
            return cls(row=2 * gathered + slices, sums=sums, version=gathered, across=0)
        across = 2 * _SUM * own * (copies - 1) // copies
        sums = _SUM * own * (shards - 1) + across
        return cls(
            row=2 * product_bytes * own * (shards - 1) + (0 if once else sums) + slices,
            sums=sums if once else 0,
            version=engine_bytes * own * (shards - 1),
            across=across,
        )

    def step(self, rows: int, updates: int) -> int:
        """Of a learner step of so many rows a rank and optimizer steps, with the version that it makes."""
        return rows * self.row + updates * self.sums + self.version
