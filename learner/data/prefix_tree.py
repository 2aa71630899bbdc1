"""Prefix trees: sequences that begin alike are one run of tokens up to where they part.

    a b c d            row, depth first     a b c d e f x y
    a b e f            token                0 1 2 3 4 5 6 7
    a b                segments             [a b) [c d) [e f) [x y)
    x y                (start, stop, end)   0 2 6 2 4 4 4 6 6 6 8 8

A token of the row is a node of the tree: the sequences through it have the same tokens up to it, so that its hidden
state is the same in all of them. A *segment* is an unbranched run of nodes. Since the row is in depth-first order, the
segment [start, stop) is followed by its descendants [stop, end), and segments tile the row. Token t is on the way to
token u exactly if t <= u < end of t's segment.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from rollout.wire.trajectory import Int32Array, UInt8Array

# Shorter prefixes, such as a token that begins every text, are computed again: sharing them would save less than the
# attention over one more segment costs.
LEAST_SHARED = 8  # tokens

Int64Array = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class PrefixTree:
    """The layout of one row: [T] over its tokens, [S] over segments, [B] over sequences in the order given."""

    segments_S3: Int32Array  # start, stop, end; ordered by start
    depths_T: Int32Array  # place of the token in its sequences, from 0
    paths_B: tuple[Int64Array, ...]  # the row's tokens that are the sequence
    # Sequences in depth-first order, with the number of their first tokens that earlier ones have brought.
    brought: tuple[tuple[int, int], ...]

    @classmethod
    def of(
        cls,
        ids_B: Sequence[Int32Array],
        kinds_B: Sequence[Hashable],
        routed_B: Sequence[UInt8Array | None] | None = None,
    ) -> PrefixTree:
        """The tree of these sequences. Only sequences of equal kinds share tokens.

        routed_B: [I, B] what tokens are computed by beside their ids, of the first I of each; tokens up to the first
        difference are shared.
        """
        order, shared = _sorted(ids_B, kinds_B, routed_B)
        lengths = [len(ids_B[item]) for item in order]
        trees = _trees(shared)
        # Large trees first: equal ones become neighbors, which packed attention computes together.
        trees.sort(key=lambda places: sum(lengths[p] - shared[p] for p in places), reverse=True)
        return cls._laid_out([(order[p], lengths[p], shared[p]) for places in trees for p in places])

    @classmethod
    def apart(cls, lengths: Sequence[int]) -> PrefixTree:
        """Sequences end to end that share nothing."""
        return cls._laid_out([(item, length, 0) for item, length in enumerate(lengths)])

    @classmethod
    def _laid_out(cls, sequences: Sequence[tuple[int, int, int]]) -> PrefixTree:
        """From (number, length, tokens shared with the one before), depth first."""
        paths: dict[int, Int64Array] = {}
        path_T = np.zeros(0, np.int64)
        depths = []
        size = 0
        for item, length, shared in sequences:
            path_T = np.concatenate([path_T[:shared], np.arange(size, size + length - shared)])
            paths[item] = path_T
            depths.append(np.arange(shared, length, dtype=np.int32))
            size += length - shared
        return cls(
            segments_S3=_segments([(length, shared) for _, length, shared in sequences]),
            depths_T=np.concatenate(depths),
            paths_B=tuple(paths[item] for item in range(len(sequences))),
            brought=tuple((item, shared) for item, _, shared in sequences),
        )

    def padded(self, tokens: int) -> PrefixTree:
        """The same with a sequence of so many tokens behind all others, which shares nothing."""
        if not tokens:
            return self
        begin, end = self.tokens, self.tokens + tokens
        return PrefixTree(
            segments_S3=np.concatenate([self.segments_S3, np.array([[begin, end, end]], np.int32)]),
            depths_T=np.concatenate([self.depths_T, np.arange(tokens, dtype=np.int32)]),
            paths_B=(*self.paths_B, np.arange(begin, end)),
            brought=(*self.brought, (len(self.paths_B), 0)),
        )

    @property
    def tokens(self) -> int:
        """T: different tokens."""
        return len(self.depths_T)

    @property
    def effective_tokens(self) -> int:
        """Tokens of all sequences."""
        return sum(map(len, self.paths_B))

    @property
    def forked(self) -> bool:
        """Whether a segment has descendants; otherwise every segment is a sequence."""
        return bool((self.segments_S3[:, 1] < self.segments_S3[:, 2]).any())


def divided(
    ids_B: Sequence[Int32Array],
    kinds_B: Sequence[Hashable],
    routed_B: Sequence[UInt8Array | None] | None,
    most: int,
) -> list[tuple[list[int], int]]:
    """Divide sequences into parts, each with the number of its different tokens: at most `most` if it can be cut.

    Parts are whole trees. A larger tree is cut between its branches such that the fewest tokens, those above the cuts,
    are in two parts. A sequence that is longer than `most` is a part of its own. routed_B: as in `PrefixTree.of`.
    """
    order, shared = _sorted(ids_B, kinds_B, routed_B)
    lengths = [len(ids_B[item]) for item in order]
    parts = []
    for tree in _trees(shared):
        for first, last in _cut([lengths[p] for p in tree], [shared[p] for p in tree], most):
            places = tree[first:last]
            size = lengths[places[0]] + sum(lengths[p] - shared[p] for p in places[1:])
            parts.append(([order[place] for place in places], size))
    return parts


def _sorted(
    ids_B: Sequence[Int32Array], kinds_B: Sequence[Hashable], routed_B: Sequence[UInt8Array | None] | None
) -> tuple[list[int], list[int]]:
    """Numbers of the sequences in lexicographic order, and how many tokens each shares with the one before it."""
    known: dict[Hashable, int] = {}
    kinds = [known.setdefault(kind, len(known)) for kind in kinds_B]
    texts = [ids_T.astype(">u4").tobytes() for ids_T in ids_B]  # ordered as their numbers are
    order = sorted(range(len(ids_B)), key=lambda item: (kinds[item], texts[item]))
    shared = [0] * len(order)
    for place in range(1, len(order)):
        one, other = order[place - 1], order[place]
        if kinds[one] == kinds[other]:
            depth = len(ids_B[one]) if texts[one] == texts[other] else _common(ids_B[one], ids_B[other])
            if routed_B is not None:
                depth = _common_routing(routed_B[one], routed_B[other], depth)
            shared[place] = depth if depth >= LEAST_SHARED or depth == len(ids_B[other]) else 0
    return order, shared


def _trees(shared: Sequence[int]) -> list[range]:
    """The places of each tree among sorted sequences."""
    borders = [*(place for place, depth in enumerate(shared) if not depth), len(shared)]
    return [range(start, stop) for start, stop in pairwise(borders)]


def _common(one_T: Int32Array, other_T: Int32Array) -> int:
    """Length of the common prefix."""
    size = min(len(one_T), len(other_T))
    differs_T = one_T[:size] != other_T[:size]
    place = int(differs_T.argmax()) if size else 0
    return place if size and differs_T[place] else size


def _common_routing(one_IB: UInt8Array | None, other_IB: UInt8Array | None, depth: int) -> int:
    """How many of the first `depth` tokens, which are equal, have equal routing or none."""
    if one_IB is None or other_IB is None:  # of one kind: neither has any
        return depth
    size = min(len(one_IB), len(other_IB), depth)
    differs_I = (one_IB[:size] != other_IB[:size]).any(-1)
    if differs_I.any():
        return int(differs_I.argmax())
    return depth if len(one_IB) == len(other_IB) else size


def _cut(lengths: Sequence[int], shared: Sequence[int], most: int) -> list[tuple[int, int]]:
    """Ranges of neighbors, sorted sequences of one tree, whose different tokens are at most `most` each.

    Dynamic programming over the place of the last cut; a cut costs the tokens that its two sides share.
    """
    count = len(lengths)
    if lengths[0] + sum(lengths[p] - shared[p] for p in range(1, count)) <= most:
        return [(0, count)]
    costs = [0.0] + [float("inf")] * count  # of the best division of the first sequences
    begins = [0] * (count + 1)  # where its last part begins
    for first in range(count):
        cost = costs[first] + (shared[first] if first else 0)
        size = lengths[first]
        for last in range(first + 1, count + 1):
            if cost < costs[last]:
                costs[last], begins[last] = cost, first
            added = lengths[last] - shared[last] if last < count else most
            size += added
            if added and size > most:
                break
    ranges = []
    last = count
    while last:
        ranges.append((begins[last], last))
        last = begins[last]
    return ranges[::-1]


def _segments(sequences: Sequence[tuple[int, int]]) -> Int32Array:
    """Segments [S, 3] from (length, tokens shared with the one before) of sequences in depth-first order."""
    closed: list[tuple[int, int, int]] = []
    path: list[
        tuple[int, int, int]
    ] = []  # segments on the way to the last sequence's end: start, stop, depth
    size = 0
    for length, shared in sequences:
        while path and path[-1][2] >= shared:
            start, stop, _ = path.pop()
            closed.append((start, stop, size))
        if path and path[-1][2] + path[-1][1] - path[-1][0] > shared:
            start, stop, depth = path.pop()
            fork = start + shared - depth
            closed.append((fork, stop, size))
            path.append((start, fork, depth))
        if length > shared:
            if path and path[-1][1] == size:  # goes on where the last sequence ended: no fork
                start, _, depth = path.pop()
                path.append((start, size + length - shared, depth))
            else:
                path.append((size, size + length - shared, shared))
        size += length - shared
    closed += [(start, stop, size) for start, stop, _ in path]
    return np.array(sorted(closed), np.int32).reshape(-1, 3)
