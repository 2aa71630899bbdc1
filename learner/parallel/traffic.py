"""Bytes that the ranks of a learner exchange, told by the size of its model.

With P parameters and R ranks, sharded over S of them, each rank receives, and sends as much, (S - 1) / S of

    a packed row    P weights for the forward pass and P for the backward one, in the type of the products (FSDP2: a
                    layer at a time)
    gradients       P sums in float32, after each row or once an optimizer step
    a version       P weights in the engines' type, gathered a layer at a time to be published

and where S < R, with every sum of gradients what the R / S copies of a part exchange: 2 (R / S - 1) / (R / S) of P / S
sums (an all-reduce).
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
    ) -> Traffic:
        """product_bytes: of a weight as products take it; engine_bytes: of one as engines do.

        once: gradients are summed once an optimizer step; shards: ranks that a parameter is sharded over, None: all.
        """
        shards = shards or ranks
        copies, own = ranks // shards, parameters // shards
        across = 2 * _SUM * own * (copies - 1) // copies
        sums = _SUM * own * (shards - 1) + across
        return cls(
            row=2 * product_bytes * own * (shards - 1) + (0 if once else sums),
            sums=sums if once else 0,
            version=engine_bytes * own * (shards - 1),
            across=across,
        )

    def step(self, rows: int, updates: int) -> int:
        """Of a learner step of so many rows a rank and optimizer steps, with the version that it makes."""
        return rows * self.row + updates * self.sums + self.version
