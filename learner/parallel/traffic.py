"""Bytes that the ranks of a learner exchange, told by the size of its model.

With P parameters and R ranks, sharded over S of them, each rank receives, and sends as much, (S - 1) / S of

    a scored row    P weights for the forward pass, in the type of the products (FSDP2: a layer at a time)
    a trained row   the same, and once more for the backward pass
    gradients       P sums in float32, after each trained row or once an optimizer step
    a version       P weights in the engines' type, gathered a layer at a time to be published

Where C of the ranks compute a row together (context.py), tokens and heads of its slices travel too, for every attention
of the forward and of the backward pass (and of the forward pass again, where activations are recomputed). A critic
needs the last hidden states of the whole row, which are gathered: (C - 1) / C of them, where every token is scored.

An adapter's gradients are whole on every rank and summed once an optimizer step (an all-reduce: 2 (R - 1) / R of them);
its base has none, and is gathered to be published merged; in NF4 it is gathered as it is stored.

Experts that are not gathered (experts.py) are left out of rows, and of gradients within the S ranks. Instead a packed
row sends each token to K experts and gets it back, in the type of the products: forward, backward, and once more where
the layer is recomputed, 2 K x width a token, layer and time. This holds where routers give every rank as many tokens; a
rank with more receives more.

Where S < R, a sum of gradients is exchanged between the R / S ranks that hold the same part, too: 2 (R - S) / R of
P / S sums.
"""

from __future__ import annotations

from dataclasses import dataclass

_SUM = 4  # bytes of a float32


@dataclass(frozen=True, slots=True)
class Travel:
    """What expert parallelism does instead of gathering experts.

    parameters: of the experts; numbers: by which the tokens of a row are sent to experts, in all layers together.
    """

    parameters: int = 0
    numbers: int = 0


@dataclass(frozen=True, slots=True)
class Passes:
    """What a rank computes in a step. trained: rows with a backward pass; scored: rows with the forward pass alone.

    valued: those of both whose last hidden states are read; taught: rows that a teacher scores; summed: times that what
    is summed beside the rows is.
    """

    trained: int
    scored: int = 0
    valued: int = 0
    taught: int = 0
    summed: int = 1


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes that each rank receives: for a row, for sums of gradients beside the rows', for a version.

    row: trained; scored: with the forward pass alone; hidden: last hidden states of a row; taught: scored by a teacher.
    across: of a sum of gradients, what comes from ranks of other copies of the model.
    """

    row: int
    scored: int
    sums: int
    version: int
    across: int
    hidden: int = 0
    taught: int = 0

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
        recomputed: bool = False,
        hidden: int = 0,
        teacher: int = 0,
    ) -> Traffic:
        """product_bytes: of a weight as products take it; engine_bytes: of one as engines do.

        once: gradients are summed once an optimizer step; shards: ranks that a parameter is sharded over, None: all.
        adapter: its parameters, where one is trained; slices: bytes of a row's slices that come from other ranks in a
        forward pass; recomputed: layers are computed again in the backward pass. base_bytes: of an adapter's base as it
        is stored; None: as products take it. travel: of experts that are not gathered. hidden: bytes of a row's last
        hidden states that come from other ranks; teacher: parameters of a teacher, which is gathered whole.
        """
        shards = shards or ranks
        copies, own = ranks // shards, parameters // shards
        gathered = own - travel.parameters // shards
        travelled = 2 * product_bytes * (travel.numbers // shards) * (shards - 1) + slices
        again = (3 if recomputed else 2) * travelled
        taught = product_bytes * (teacher // shards) * (shards - 1)
        if adapter:
            base = product_bytes * parameters if base_bytes is None else base_bytes
            beside = (base - product_bytes * travel.parameters) // shards * (shards - 1)
            return cls(
                row=2 * beside + again,
                scored=beside + travelled,
                sums=2 * _SUM * adapter * (ranks - 1) // ranks,
                version=base // shards * (shards - 1),
                across=0,
                hidden=hidden,
                taught=taught,
            )
        across = 2 * _SUM * (copies - 1)  # of a parameter's part, which is divided by the copies
        sums = _SUM * gathered * (shards - 1) + across * gathered // copies
        experts = across * (own - gathered) // copies  # summed once an optimizer step
        weights = product_bytes * gathered * (shards - 1)
        return cls(
            row=2 * weights + (0 if once else sums) + again,
            scored=weights + travelled,
            sums=experts + (sums if once else 0),
            version=engine_bytes * own * (shards - 1),
            across=across * own // copies,
            hidden=hidden,
            taught=taught,
        )

    def step(self, passes: Passes) -> int:
        """Of a learner step, with the version that it makes."""
        rows = passes.trained * self.row + passes.scored * self.scored
        beside = passes.valued * self.hidden + passes.taught * self.taught
        return rows + beside + passes.summed * self.sums + self.version
