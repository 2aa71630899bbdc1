"""The tree of a row beside the plain definition: a node is a prefix that some sequence has."""

from __future__ import annotations

from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from learner.data import prefix_tree
from learner.data.prefix_tree import PrefixTree, divided
from rollout.wire.trajectory import Int32Array


@st.composite
def related(draw: st.DrawFn) -> list[Int32Array]:
    """Sequences of few different tokens: forks anywhere, prefixes of others, duplicates, and strangers."""
    found: list[Int32Array] = []
    for _ in range(draw(st.integers(1, 9))):
        fresh = draw(st.lists(st.integers(0, 3), max_size=8))
        known = found[draw(st.integers(0, len(found) - 1))].tolist() if found else []
        kept = known[: draw(st.integers(0, len(known)))]
        found.append(np.array((kept + fresh) or [0], np.int32))
    return found


def _prefixes(sequences: list[Int32Array]) -> set[tuple[int, ...]]:
    return {tuple(s[:size].tolist()) for s in sequences for size in range(1, len(s) + 1)}


def _tree(sequences: list[Int32Array]) -> PrefixTree:
    return PrefixTree.of(sequences, [()] * len(sequences))


def _arrays(*texts: str) -> list[Int32Array]:
    return [np.array([ord(letter) for letter in text], np.int32) for text in texts]


def test_a_tree_is_the_one_drawn_by_hand() -> None:
    tree = _tree(_arrays("xy", "abef", "ab", "abcd"))
    assert tree.segments_S3.tolist() == [[0, 2, 6], [2, 4, 4], [4, 6, 6], [6, 8, 8]]
    assert [path.tolist() for path in tree.paths_B] == [[6, 7], [0, 1, 4, 5], [0, 1], [0, 1, 2, 3]]
    assert tree.depths_T.tolist() == [0, 1, 2, 3, 2, 3, 0, 1]
    assert (tree.tokens, tree.effective_tokens, tree.forked) == (8, 12, True)


@given(related())
def test_nodes_are_the_different_prefixes_and_ancestors_are_told_by_ends(sequences: list[Int32Array]) -> None:
    tree = _tree(sequences)
    assert tree.tokens == len(_prefixes(sequences))
    prefix_of: dict[int, tuple[int, ...]] = {}
    for ids_T, path_T in zip(sequences, tree.paths_B, strict=True):
        assert tree.depths_T[path_T].tolist() == list(range(len(ids_T)))
        for depth, node in enumerate(path_T.tolist()):
            assert prefix_of.setdefault(node, tuple(ids_T[: depth + 1].tolist())) == tuple(ids_T[: depth + 1])
    starts, stops, ends = tree.segments_S3.T
    assert starts.tolist() == [0, *stops[:-1]] and stops[-1] == tree.tokens
    ends_T = np.repeat(ends, stops - starts)
    for node, prefix in prefix_of.items():
        above = {t for t in range(tree.tokens) if t <= node < ends_T[t]}
        assert {prefix_of[t] for t in above} == {prefix[:size] for size in range(1, len(prefix) + 1)}
    forks = {prefix[:-1] for prefix in prefix_of.values() if len(prefix) > 1}
    children = [sum(p[:-1] == prefix for p in prefix_of.values()) for prefix in forks]
    roots = len({prefix[:1] for prefix in prefix_of.values()})
    assert len(starts) == roots + sum(count for count in children if count > 1), "segments are unbranched"


def test_only_sequences_of_one_kind_share_tokens() -> None:
    sequences = _arrays("abc", "abc", "abd")
    tree = PrefixTree.of(sequences, [("one",), ("other",), ("one",)])
    assert tree.tokens == 4 + 3
    assert sorted(
        len(part) for part, _ in divided(sequences, [("one",), ("other",), ("one",)], None, 10)
    ) == [1, 2]


def test_a_short_prefix_is_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_tree, "LEAST_SHARED", 8)
    texts = ("abcdefg", "abcdefgh")
    for shared, text in zip((0, 8), texts, strict=True):
        tree = _tree(_arrays(text + "xy", text + "z"))
        assert tree.tokens == 2 * len(text) + 3 - shared
    assert _tree(_arrays("ab", "ab")).tokens == 2, "but a duplicate never is"


@given(related(), st.integers(1, 30))
def test_parts_are_whole_sequences_within_the_limit_cut_at_the_least_cost(
    sequences: list[Int32Array], most: int
) -> None:
    parts = divided(sequences, [()] * len(sequences), None, most)
    assert sorted(item for part, _ in parts for item in part) == list(range(len(sequences)))
    for part, size in parts:
        inside = [sequences[item] for item in part]
        assert size == len(_prefixes(inside))
        assert size <= most or size == max(map(len, inside))
    for root in {int(s[0]) for s in sequences}:
        own = [size for part, size in parts if sequences[part[0]][0] == root]
        assert sum(own) == _cheapest([s for s in sequences if s[0] == root], most)


def _cheapest(sequences: list[Int32Array], most: int) -> int:
    """The fewest tokens over all ways to cut the sorted, different sequences of a tree."""
    ordered = [np.array(text, np.int32) for text in sorted({tuple(s.tolist()) for s in sequences})]
    found = []
    for count in range(len(ordered)):
        for cuts in combinations(range(1, len(ordered)), count):
            borders = [0, *cuts, len(ordered)]
            parts = [ordered[a:b] for a, b in pairwise(borders)]
            sizes = [len(_prefixes(part)) for part in parts]
            if all(size <= most or len(part) == 1 for size, part in zip(sizes, parts, strict=True)):
                found.append(sum(sizes))
    return min(found)
