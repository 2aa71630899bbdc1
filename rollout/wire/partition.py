"""Deterministic partition of a step's groups over the ranks of the learner, without communication."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa


@dataclass(frozen=True, slots=True)
class Partition:
    """Share of one of `ranks` learner processes; the default is the whole step."""

    rank: int = 0
    ranks: int = 1

    def of(self, batches: Sequence[pa.RecordBatch]) -> list[pa.RecordBatch]:
        """Select this rank's groups, in the step's order; a group is never divided."""
        return [
            batches[index] for index in deal([_tokens(batch) for batch in batches], self.ranks)[self.rank]
        ]


WHOLE = Partition()


class StepTorn(RuntimeError):
    """Ranks cannot get shares of the same step any more: the learner must go back to its newest checkpoint."""


def deal(sizes: Sequence[int], ranks: int) -> list[list[int]]:
    """Assign items to ranks, largest first, each to the rank with the smallest load; returns sorted indices by rank.

    Graham 1969: the largest load is at most 4/3 of the optimal one. Ties are broken by order, so that all ranks compute
    the same assignment from the sizes.
    """
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        rank = min(range(ranks), key=lambda rank: (loads[rank], len(shares[rank])))
        shares[rank].append(index)
        loads[rank] += sizes[index]
    return [sorted(share) for share in shares]


def _tokens(batch: pa.RecordBatch) -> int:
    """Number of tokens in a group's rows, prompts and answers."""
    lists = (batch.column(name) for name in ("prompt_ids", "action_ids"))
    return sum(column.offsets[-1].as_py() - column.offsets[0].as_py() for column in lists)
