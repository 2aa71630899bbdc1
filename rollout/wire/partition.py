"""Deterministic partition of a step's groups over the ranks of the learner, without communication."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from rollout.wire.trajectory import Int32Array

# Depth in a text at which a token's attention costs a model as much as its layers' products: six times the model's
# width (per layer 4 x width x depth against 24 x width^2 operations), here of a width of 2,048.
_ATTENTION_DEPTH = 12_288
_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd: multiplying by it loses nothing modulo 2^64


@dataclass(frozen=True, slots=True)
class Partition:
    """Share number `rank` of `ranks` equal ones; the default is the whole step.

    readers: learner processes that take this share, which compute its rows together.
    """

    rank: int = 0
    ranks: int = 1
    readers: int = 1

    def of(self, batches: Sequence[pa.RecordBatch]) -> list[pa.RecordBatch]:
        """Select the share's groups, in the step's order; a group is never divided."""
        sizes = [work(_texts(batch)) for batch in batches] if self.ranks > 1 else [1.0] * len(batches)
        return [batches[index] for index in deal(sizes, self.ranks)[self.rank]]


WHOLE = Partition()


class StepTorn(RuntimeError):
    """Ranks cannot get shares of the same step any more: the learner must go back to its newest checkpoint."""


def deal(sizes: Sequence[float], ranks: int) -> list[list[int]]:
    """Assign items to ranks, largest first, each to the rank with the smallest load; returns sorted indices by rank.

    Graham 1969: the largest load is at most 4/3 of the optimal one. Ties are broken by order, so that all ranks compute
    the same assignment from the sizes.
    """
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0.0] * ranks
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        rank = min(range(ranks), key=lambda rank: (loads[rank], len(shares[rank])))
        shares[rank].append(index)
        loads[rank] += sizes[index]
    return [sorted(share) for share in shares]


def work(texts: Sequence[Int32Array]) -> float:
    """What texts cost a learner that computes shared prefixes once: different tokens, deep ones more for attention.

    Two tokens are the same if their texts are equal up to them.
    """
    longest = max(map(len, texts), default=0)
    powers = np.cumprod(np.full(longest, _BASE))
    # A hash of the text up to each token: equal for equal prefixes, and different ones collide once in 2^64.
    hashes = [np.cumsum((ids_T.astype(np.uint64) + np.uint64(1)) * powers[: len(ids_T)]) for ids_T in texts]
    if not longest:
        return 0.0
    depths = np.concatenate([np.arange(len(ids_T)) for ids_T in texts])
    _, first = np.unique(np.concatenate(hashes), return_index=True)
    return len(first) + float(depths[first].sum()) / _ATTENTION_DEPTH


def _texts(batch: pa.RecordBatch) -> list[Int32Array]:
    """The segments of a group's rows; a row holds only what its turn added to its segment."""
    prompts, actions = (batch.column(name) for name in ("prompt_ids", "action_ids"))
    owners = zip(batch.column("episode").to_numpy(), batch.column("segment").to_numpy(), strict=True)
    pieces: dict[tuple[int, int], list[Int32Array]] = {}
    for row, owner in enumerate(owners):
        pieces.setdefault(owner, []).extend(
            column[row].values.to_numpy(zero_copy_only=False) for column in (prompts, actions)
        )
    return [np.concatenate(each) for each in pieces.values()]
