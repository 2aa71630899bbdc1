"""Bytes that the ranks of a learner exchange, told by the size of its model.

With P parameters and R ranks each rank receives, and sends as much, (R - 1) / R of

    a packed row    P weights for the forward pass and P for the backward one, in the type of the products, and P sums
                    of gradients in float32 (FSDP2: all of it a layer at a time)
    a version       P weights in the engines' type, gathered a layer at a time to be published
"""

from __future__ import annotations

from dataclasses import dataclass

_SUM = 4  # bytes of a float32


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes that each rank receives."""

    row: int
    version: int

    @classmethod
    def of(cls, parameters: int, ranks: int, product_bytes: int, engine_bytes: int) -> Traffic:
        """product_bytes: of a weight as products take it; engine_bytes: of one as engines do."""
        return cls(
            row=parameters * (2 * product_bytes + _SUM) * (ranks - 1) // ranks,
            version=parameters * engine_bytes * (ranks - 1) // ranks,
        )

    def step(self, rows: int) -> int:
        """Of a step of so many rows a rank, with the version that it makes."""
        return rows * self.row + self.version
