"""Which groups of a step belong to which rank of the learner: known to all, said by nobody."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa


@dataclass(frozen=True, slots=True)
class Partition:
    """What one of `ranks` learner processes asks for; as it stands, everything."""

    rank: int = 0
    ranks: int = 1

    def of(self, batches: Sequence[pa.RecordBatch]) -> list[pa.RecordBatch]:
        """Of a step's groups this rank's, in the step's order; a group is never divided."""
        return [
            batches[place] for place in deal([_tokens(batch) for batch in batches], self.ranks)[self.rank]
        ]


WHOLE = Partition()


class StepTorn(RuntimeError):
    """Ranks can not be given shares of the same step any more: the learner has to go back to its newest checkpoint."""


def deal(sizes: Sequence[int], ranks: int) -> list[list[int]]:
    """Places of the items that each rank gets, in rising order: the largest first, each to whoever has least so far.

    Graham 1969: the fullest rank has at most 4/3 of what the best division would give it. Equals are dealt in order,
    so that everyone who knows the sizes knows the division.
    """
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for place in sorted(range(len(sizes)), key=lambda place: -sizes[place]):
        rank = min(range(ranks), key=lambda rank: (loads[rank], len(shares[rank])))
        shares[rank].append(place)
        loads[rank] += sizes[place]
    return [sorted(share) for share in shares]


def _tokens(batch: pa.RecordBatch) -> int:
    """Tokens that a group's rows hold, prompts and answers."""
    lists = (batch.column(name) for name in ("prompt_ids", "action_ids"))
    return sum(column.offsets[-1].as_py() - column.offsets[0].as_py() for column in lists)
