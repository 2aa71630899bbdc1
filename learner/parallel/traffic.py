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

Experts that are not gathered (experts.py) are left out of rows, and of gradients within the S ranks. Instead a packed
row sends each token to K experts and gets it back, in the type of the products: forward, backward, and once more where
the layer is recomputed, 4 or 6 times K x width a token and layer. This holds where routers give every rank as many
tokens; a rank with more receives more.

Where S < R, a sum of gradients is exchanged between the R / S ranks that hold the same part, too: 2 (R - S) / R of
P / S sums.
"""

from __future__ import annotations

from dataclasses import dataclass

_SUM = 4  # bytes of a float32


@dataclass(frozen=True, slots=True)
class Travel:
    """What expert parallelism does instead of gathering experts.

    parameters: of the experts; numbers: by which the tokens of a row are sent to experts, in all layers together;
    recomputed: layers are computed again in the backward pass.
    """

    parameters: int = 0
    numbers: int = 0
    recomputed: bool = False

    @property
    def exchanged(self) -> int:
        """Numbers that a row exchanges, the own rank's included."""
        return (6 if self.recomputed else 4) * self.numbers


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
        travel: Travel = Travel(),
    ) -> Traffic:
        """product_bytes: of a weight as products take it; engine_bytes: of one as engines do.

        once: gradients are summed once an optimizer step; shards: ranks that a parameter is sharded over, None: all.
        adapter: its parameters, where one is trained; slices: bytes of a row's slices that come from other ranks.
        base_bytes: of an adapter's base as it is stored; None: as products take it. travel: of experts that are not
        gathered.
        """
        shards = shards or ranks
        copies, own = ranks // shards, parameters // shards
        gathered = own - travel.parameters // shards
        travelled = product_bytes * (travel.exchanged // shards) * (shards - 1) + slices
        if adapter:
            base = product_bytes * parameters if base_bytes is None else base_bytes
            beside = (base - product_bytes * travel.parameters) // shards * (shards - 1)
            return cls(
                row=2 * beside + travelled,
                sums=2 * _SUM * adapter * (ranks - 1) // ranks,
                version=base // shards * (shards - 1),
                across=0,
            )
        across = 2 * _SUM * (copies - 1)  # of a parameter's part, which is divided by the copies
        sums = _SUM * gathered * (shards - 1) + across * gathered // copies
        experts = across * (own - gathered) // copies  # summed once an optimizer step
        return cls(
            row=2 * product_bytes * gathered * (shards - 1) + (0 if once else sums) + travelled,
            sums=experts + (sums if once else 0),
            version=engine_bytes * own * (shards - 1),
            across=across * own // copies,
        )

    def step(self, rows: int, updates: int) -> int:
        """Of a learner step of so many rows a rank and optimizer steps, with the version that it makes."""
        return rows * self.row + updates * self.sums + self.version
