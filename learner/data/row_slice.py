"""What one rank of a context group computes of a packed row: a slice of its tokens, and the pairs that begin there.

    row, C = 2           t t t t t t t t t p      nine tokens, and one that makes the slices equal: nobody reads it
    slices               0 0 0 0 0 1 1 1 1 1      rank of the group
    pair (node, target)  of the rank whose slice has the node, wherever the target is

Slices are of inputs. The hidden state that predicts a token is that of the node before it, so a sequence that goes on
in the next slice needs nothing more.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from learner.data.batch import MicroBatch
from learner.parallel.context import ContextGroup


@dataclass(frozen=True, slots=True)
class RowSlice:
    """own: the row with the tree of all its tokens, of which the own ones alone have inputs, and their pairs."""

    row: MicroBatch
    own: MicroBatch
    group: ContextGroup
    counts: tuple[int, ...]  # pairs of each rank
    order_M: Tensor | None  # the place of each pair among those of all ranks in order of rank; None: the same

    @classmethod
    def of(cls, row: MicroBatch, group: ContextGroup) -> RowSlice:
        """The slice of this rank; all of the row where it is the only one."""
        if group.size == 1:
            return cls(row, row, group, (len(row.targets_M),), None)
        length = group.length(row.tree.tokens)
        owner_M = row.score_index_M.div(length, rounding_mode="floor")
        sorted_M = owner_M.argsort(stable=True)
        counts = tuple(owner_M.bincount(minlength=group.size).tolist())
        pairs_m = sorted_M.split(counts)[group.rank]
        own = replace(
            row,
            tree=row.tree.padded(group.lacking(row.tree.tokens)),
            input_ids_T=group.own(row.input_ids_T),
            position_ids_T=group.own(row.position_ids_T),
            score_index_M=row.score_index_M[pairs_m] - group.rank * length,
            targets_M=row.targets_M[pairs_m],
            routed_TB=None if row.routed_TB is None else group.own(row.routed_TB),
            routed_T=None if row.routed_T is None else group.own(row.routed_T),
        )
        return cls(row, own, group, counts, sorted_M.argsort())

    def expanded(self, own_m: Tensor) -> Tensor:
        """Values of all scored tokens of the row from those of the own pairs: [N, ...] from [m, ...].

        Every rank must compute the same of them: see `ContextGroup.gathered`.
        """
        found_M = self.group.gathered(own_m, self.counts)
        return self.row.expanded(found_M if self.order_M is None else found_M.index_select(0, self.order_M))
