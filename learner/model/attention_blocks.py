"""Which queries of a packed row attend to which keys: a few dense blocks instead of a [T, T] mask.

    row       p p p p p p a a a a b b b b b c c d d e       p, a, b long segments; c, d, e short ones
    runs      p x p, a x a, b x b                           causal, neighbors of one length in one call
    tiles     c c d d e x (short ancestors and itself)      masked; all tiles of a row in one call or a few
    further   everything behind p x p                       no mask: every descendant sees all of p

Every token is a query of exactly one run or tile, and of a further block for each of its other ancestors that are long
segments; a long segment is so of one for all its short ancestors. `tree_attention` merges the blocks of a query. The
mask of a tile is the rule of `learner.data.prefix_tree`: t <= u < end of t's segment.

A window that is shorter than a sequence cuts all segments into tiles, whose keys are the ancestors within it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from learner.data.prefix_tree import Int64Array, PrefixTree
from learner.parallel.context import ContextGroup

LONG = 64  # tokens of a segment that is worth a block of its own in a row with forks
TILE = 32  # queries of a tile
_LARGEST_CALL = 2**18  # gathered keys of one call


@dataclass(frozen=True, slots=True)
class Range:
    """`count` neighbors of `length` tokens each, from `start` on: views of the row."""

    start: int
    count: int
    length: int

    def take(self, x_THD: Tensor) -> Tensor:
        """[count, H, length, D] of the row."""
        rows = x_THD[self.start : self.start + self.count * self.length]
        return rows.unflatten(0, (self.count, self.length)).transpose(1, 2)

    def store(self, x_THD: Tensor, values: Tensor) -> None:
        """Write [count, H, length, D] into the row."""
        self.take(x_THD).copy_(values)

    def add(self, x_THD: Tensor, values: Tensor) -> None:
        """Add [count, H, length, D] to the row."""
        self.take(x_THD).add_(values)


@dataclass(frozen=True, slots=True)
class Gathered:
    """Any tokens: copies of them, [n, L], where shorter lists are padded.

    Padding repeats a token. As queries it is computed and dropped, and has no gradient; as keys a mask leaves it out.
    """

    index_nL: Tensor  # int64
    real_nL: Tensor  # bool
    slots_R: Tensor  # int64, the places of what is no padding among the n * L
    tokens_R: Tensor  # int64, the tokens that are there

    def take(self, x_THD: Tensor) -> Tensor:
        """[n, H, L, D] of the row."""
        taken = x_THD.index_select(0, self.index_nL.flatten())
        return taken.unflatten(0, self.index_nL.shape).transpose(1, 2)

    def store(self, x_THD: Tensor, values: Tensor) -> None:
        """Write [n, H, L, D] into the row, without padding."""
        real_RHD = values.transpose(1, 2).flatten(0, 1).index_select(0, self.slots_R)
        x_THD.index_copy_(0, self.tokens_R, real_RHD.to(x_THD.dtype))

    def add(self, x_THD: Tensor, values: Tensor) -> None:
        """Add [n, H, L, D] to the row, a token as often as it is there."""
        flat = values.transpose(1, 2).flatten(0, 1).flatten(1)
        index = self.index_nL.flatten()[:, None].expand(flat.shape)
        x_THD.flatten(1).scatter_add_(0, index, flat)


@dataclass(frozen=True, slots=True)
class Block:
    """n x (queries attend to keys). A mask is added to the scores: [n, 1, L, W], 0 or -inf."""

    queries: Range | Gathered
    keys: Range | Gathered
    causal: bool = False
    mask: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Blocks:
    """own: every token is a query of one of them, which has the token itself among its keys."""

    own: list[Block]
    further: list[Block]

    @property
    def apart(self) -> bool:
        """Whether every token is a query, and a key, of one block only."""
        return not self.further and all(isinstance(block.keys, Range) for block in self.own)


class RowAttention:
    """How the tokens of one row attend to each other: made once for a pass, asked by every layer."""

    def __init__(self, tree: PrefixTree, context: ContextGroup | None = None) -> None:
        """context: the ranks of which each has a slice of the row's tokens; None: this one has all."""
        self.tree = tree
        self.context = context or ContextGroup()
        self._blocks: dict[tuple[int | None, torch.dtype], Blocks] = {}
        self._borders: Tensor | None = None

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return int(self.tree.depths_T.max()) + 1

    def blocks(self, window: int | None, like: Tensor) -> Blocks:
        """The blocks of a row, for queries of the type and on the device of `like`.

        window: the tokens that a token attends to at most, itself included.
        """
        if window is not None and window >= self.longest:
            window = None
        key = window, like.dtype
        if key not in self._blocks:
            self._blocks[key] = _Layout(self.tree, window, like).blocks()
        return self._blocks[key]

    def borders(self, device: torch.device) -> Tensor:
        """Borders of the sequences of a row without forks: int32 [B + 1]."""
        if self._borders is None:
            self._borders = torch.from_numpy(np.append(self.tree.segments_S3[:, 0], self.tree.tokens)).to(
                device, torch.int32
            )
        return self._borders


@dataclass
class _Layout:
    """The blocks of one row under one window that cuts, or none."""

    tree: PrefixTree
    window: int | None
    like: Tensor
    ends_T: Int64Array = field(init=False)
    long_S: NDArray[np.bool_] = field(init=False)
    parents_S: list[int] = field(init=False)

    def __post_init__(self) -> None:
        starts_S, stops_S, ends_S = self.tree.segments_S3.astype(np.int64).T
        self.ends_T = np.repeat(ends_S, stops_S - starts_S)
        if self.window is not None:
            self.long_S = np.zeros(len(starts_S), bool)
        else:
            self.long_S = stops_S - starts_S >= (LONG if self.tree.forked else 1)
        self.parents_S = _parents(ends_S.tolist(), starts_S.tolist())

    def blocks(self) -> Blocks:
        return Blocks([*self._runs(), *self._tiles()], list(self._further()))

    def _runs(self) -> Iterator[Block]:
        """The long segments, each attending to itself."""
        segments = zip(self.tree.segments_S3.tolist(), self.long_S.tolist(), strict=True)
        for (long, length), same in groupby(segments, key=lambda each: (each[1], each[0][1] - each[0][0])):
            found = [start for (start, _, _), _ in same]
            if long:
                here = Range(found[0], len(found), length)
                yield Block(here, here, causal=True)

    def _further(self) -> Iterator[Block]:
        """Descendants of long segments attending to those, and long segments to their short ancestors."""
        for segment, (start, stop, end) in enumerate(self.tree.segments_S3.tolist()):
            if not self.long_S[segment]:
                continue
            here = Range(start, 1, stop - start)
            if end > stop:
                yield Block(Range(stop, 1, end - stop), here)
            above = self._short_above(segment, start, 0)
            if len(above):
                yield Block(here, self._gathered(*_padded([above])))

    def _tiles(self) -> Iterator[Block]:
        """Stretches of short segments in pieces of at most TILE tokens, pieces of about as many keys in one call."""
        tiles = [(first, last, self._keys(first, last)) for first, last in self._pieces()]
        by_width: dict[int, list[tuple[int, int, Int64Array]]] = {}
        for tile in tiles:
            by_width.setdefault((len(tile[2]) - 1).bit_length(), []).append(tile)
        for found in by_width.values():
            at_once = max(_LARGEST_CALL // max(len(keys) for *_, keys in found), 1)
            for first in range(0, len(found), at_once):
                yield self._tile_block(found[first : first + at_once])

    def _pieces(self) -> Iterator[tuple[int, int]]:
        for long, same in groupby(range(len(self.long_S)), key=lambda segment: self.long_S[segment]):
            if not long:
                stretch = list(same)
                last = int(self.tree.segments_S3[stretch[-1], 1])
                for first in range(int(self.tree.segments_S3[stretch[0], 0]), last, TILE):
                    yield first, min(first + TILE, last)

    def _keys(self, first: int, last: int) -> Int64Array:
        """The tokens that a tile attends to: those ancestors of its first token, and the tile."""
        # Of tokens before the tile, the ancestors of its further tokens are ancestors of the first one too.
        lowest = int(self.tree.depths_T[first:last].min())
        nearest = 0 if self.window is None else max(lowest - self.window + 1, 0)
        segment = int(np.searchsorted(self.tree.segments_S3[:, 0], first, side="right")) - 1
        start = int(self.tree.segments_S3[segment, 0])
        skipped = max(nearest - int(self.tree.depths_T[start]), 0)
        own = np.arange(min(start + skipped, first), last)
        return np.concatenate([self._short_above(segment, start, nearest), own])

    def _short_above(self, segment: int, first: int, nearest: int) -> Int64Array:
        """Tokens of the short ancestors of a segment, at depths of at least `nearest`."""
        found: list[Int64Array] = [np.zeros(0, np.int64)]
        while (segment := self.parents_S[segment]) >= 0:
            start, stop, _ = self.tree.segments_S3[segment].tolist()
            skipped = max(nearest - int(self.tree.depths_T[start]), 0)
            if skipped >= stop - start:
                break
            if not self.long_S[segment]:
                found.append(np.arange(start + skipped, stop))
        return np.concatenate(found[::-1])

    def _tile_block(self, tiles: Sequence[tuple[int, int, Int64Array]]) -> Block:
        query_nL, real_nL = _padded([np.arange(first, last) for first, last, _ in tiles])
        key_nW, real_nW = _padded([found for *_, found in tiles])
        query_nL1, key_n1W = query_nL[:, :, None], key_nW[:, None]
        seen = (key_n1W <= query_nL1) & (query_nL1 < self.ends_T[key_n1W]) & real_nW[:, None]
        if self.window is not None:
            seen &= self.tree.depths_T[query_nL1] - self.tree.depths_T[key_n1W] < self.window
        # In the type of the queries: torch's kernel misreads a mask of another type without an error.
        mask = self._tensor(np.where(seen, np.float32(0), np.float32(-np.inf))[:, None]).to(self.like.dtype)
        return Block(self._gathered(query_nL, real_nL), self._gathered(key_nW, real_nW), mask=mask)

    def _gathered(self, index_nL: Int64Array, real_nL: NDArray[np.bool_]) -> Gathered:
        arrays = index_nL, real_nL, np.flatnonzero(real_nL), index_nL[real_nL]
        return Gathered(*map(self._tensor, arrays))

    def _tensor(self, array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(array).to(self.like.device)


def _padded(lists: Sequence[Int64Array]) -> tuple[Int64Array, NDArray[np.bool_]]:
    """Lists of tokens as one array, padded with the last token of each, and what is no padding: [n, L] each."""
    lengths = np.array([len(found) for found in lists])
    places_L = np.arange(lengths.max())
    index_nL = np.stack([found[np.minimum(places_L, len(found) - 1)] for found in lists])
    return index_nL, places_L < lengths[:, None]


def _parents(ends: Sequence[int], starts: Sequence[int]) -> list[int]:
    """The parent of every segment, -1 for roots."""
    parents: list[int] = []
    path: list[int] = []
    for segment, start in enumerate(starts):
        while path and ends[path[-1]] <= start:
            path.pop()
        parents.append(path[-1] if path else -1)
        path.append(segment)
    return parents
