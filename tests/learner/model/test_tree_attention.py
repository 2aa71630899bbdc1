"""Attention over the blocks of a prefix tree equals attention with a mask of the whole row, and so do its gradients."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from learner.data.prefix_tree import PrefixTree
from learner.model import attention_kernels
from learner.model.attention_blocks import RowAttention
from learner.model.tree_attention import tree_attention
from rollout.wire.trajectory import Int32Array
from tests.learner.data.test_prefix_tree import related

SCALE = 0.3


def _dense(query: Tensor, key: Tensor, value: Tensor, tree: PrefixTree, window: int | None) -> Tensor:
    """Softmax over a mask [T, T] that is made by walking along every sequence."""
    seen_TT = torch.zeros(tree.tokens, tree.tokens, dtype=torch.bool)
    for path_T in tree.paths_B:
        for depth, node in enumerate(path_T):
            seen_TT[node, path_T[max(0, depth + 1 - (window or len(path_T))) : depth + 1]] = True
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scores_HTT = torch.einsum("thd,uhd->htu", query, key) * SCALE
    return torch.einsum("htu,uhd->thd", scores_HTT.masked_fill(~seen_TT, -torch.inf).softmax(-1), value)


def _inputs(tokens: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    shapes = (tokens, 4, 8), (tokens, 2, 8), (tokens, 2, 8)
    made = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    return [x.requires_grad_() for x in made]


def _both(tree: PrefixTree, window: int | None, dtype: torch.dtype = torch.float64) -> list[list[Tensor]]:
    """Output and gradients of query, key and value: by blocks, and dense in float64."""
    inputs = _inputs(tree.tokens, dtype)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    found = tree_attention(*inputs, RowAttention(tree).blocks(window, inputs[0]), SCALE)
    dense = _dense(*wide, tree, window)
    pull = torch.randn_like(dense).to(dtype)
    return [
        [found, *torch.autograd.grad(found, inputs, pull)],
        [dense, *torch.autograd.grad(dense, wide, pull.double())],
    ]


@given(
    sequences=st.lists(related(), min_size=1, max_size=2).map(
        lambda found: [s for some in found for s in some]
    ),
    long=st.sampled_from([1, 2, 4, 64]),
    tile=st.sampled_from([1, 3, 5, 64]),
    window=st.sampled_from([None, 1, 2, 5]),
)
def test_blocks_of_any_sizes_equal_one_mask(
    sequences: list[Int32Array], long: int, tile: int, window: int | None
) -> None:
    tree = PrefixTree.of(sequences, [()] * len(sequences))
    where = "learner.model.attention_blocks"
    with patch(f"{where}.LONG", long), patch(f"{where}.TILE", tile):
        for one, other in zip(*_both(tree, window), strict=True):
            torch.testing.assert_close(one, other, atol=1e-9, rtol=0)


def _group(prompt: int, answers: list[int]) -> PrefixTree:
    rng = np.random.default_rng(0)
    opening = rng.integers(0, 9, prompt)
    sequences = [
        np.concatenate([opening, [9 + i], rng.integers(0, 9, size - 1)]) for i, size in enumerate(answers)
    ]
    return PrefixTree.of([s.astype(np.int32) for s in sequences], [()] * len(answers))


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize(
    ("prompt", "answers"),
    [(700, [90, 90, 90, 40]), (30, [100, 7, 7, 80]), (5, [600])],
    ids=["long prompt", "short prompt", "one sequence"],
)
def test_rows_of_real_sizes_equal_one_mask(prompt: int, answers: list[int], window: int | None) -> None:
    for one, other in zip(*_both(_group(prompt, answers), window), strict=True):
        torch.testing.assert_close(one, other, atol=1e-9, rtol=0)


def test_values_may_be_narrower_than_keys() -> None:
    tree = _group(70, [9, 80])
    query, key, value = (x.detach() for x in _inputs(tree.tokens))
    found = tree_attention(query, key, value[..., :5], RowAttention(tree).blocks(None, query), SCALE)
    torch.testing.assert_close(found, _dense(query, key, value[..., :5], tree, None), atol=1e-9, rtol=0)
    with pytest.raises(ValueError, match="values of 8 numbers are wider than queries of 5"):
        tree_attention(query[..., :5], key[..., :5], value, RowAttention(tree).blocks(None, query), SCALE)


def test_bfloat16_is_merged_in_float32() -> None:
    tree = _group(300, [100, 100, 20])
    for one, other in zip(*_both(tree, None, torch.bfloat16), strict=True):
        assert one.dtype == torch.bfloat16
        torch.testing.assert_close(one.double(), other, atol=0.05, rtol=0.02)


def test_a_row_without_forks_is_one_call_for_neighbors_of_one_length() -> None:
    blocks = RowAttention(PrefixTree.apart([9, 9, 5])).blocks(None, torch.zeros(1))
    assert [(b.queries.count, b.queries.length, b.causal) for b in blocks.own] == [(2, 9, True), (1, 5, True)]  # type: ignore[union-attr]
    assert not blocks.further


def _scores(query: Tensor, key: Tensor, bias: Tensor | None, causal: int, scale: float) -> Tensor:
    scores_nHLW = torch.einsum("nlhd,nwhd->nhlw", query, key) * scale
    if bias is not None:
        assert bias.stride(-2) % 16 == 0, "the kernel reads aligned rows"
        scores_nHLW = scores_nHLW + bias
    ahead_LW = torch.ones(scores_nHLW.shape[-2:], dtype=torch.bool).triu(1)
    return scores_nHLW.masked_fill(ahead_LW, -torch.inf) if causal else scores_nHLW


def _efficient(
    query: Tensor, key: Tensor, value: Tensor, bias: Any, *rest: Any, scale: float
) -> tuple[Tensor, ...]:
    """What CUDA's kernel is documented to compute, by its arguments."""
    *_, dropout, causal, with_lse = rest
    assert (dropout, with_lse) == (0.0, True)
    scores_nHLW = _scores(query, key, bias, causal, scale)
    out = torch.einsum("nhlw,nwhd->nlhd", scores_nHLW.softmax(-1), value)
    lse = scores_nHLW.logsumexp(-1)
    return out, torch.nn.functional.pad(lse, (0, -lse.shape[-1] % 32)), query, query


def _efficient_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, bias: Any, out: Tensor, *rest: Any, scale: float
) -> tuple[Tensor | None, ...]:
    _, _, longest_q, longest_k, lse, dropout, _, _, causal, _ = rest
    assert (longest_q, longest_k, dropout, lse.shape[-1] % 32) == (query.shape[1], key.shape[1], 0.0, 0)
    lse_nHL1 = lse[..., : query.shape[1], None]
    probs_nHLW = (_scores(query, key, bias, causal, scale) - lse_nHL1).exp()
    pull_nHLW = torch.einsum("nlhd,nwhd->nhlw", grad, value) - (grad * out).sum(-1).transpose(1, 2)[..., None]
    moved_nHLW = probs_nHLW * pull_nHLW * scale
    return (
        torch.einsum("nhlw,nwhd->nlhd", moved_nHLW, key),
        torch.einsum("nhlw,nlhd->nwhd", moved_nHLW, query),
        torch.einsum("nhlw,nlhd->nwhd", probs_nHLW, grad),
        None,
    )


@pytest.mark.parametrize("masked", [False, True])
def test_cudas_kernel_is_given_what_it_takes(masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # With stand-ins: what the kernel itself computes has to be seen on a GPU.
    monkeypatch.setattr(attention_kernels, "_CUDA", _efficient)
    monkeypatch.setattr(attention_kernels, "_CUDA_BACKWARD", _efficient_backward)
    generator = torch.Generator().manual_seed(0)
    shapes = (3, 4, 9, 8), (3, 2, 13, 8), (3, 2, 13, 8), (3, 4, 9, 8)
    *inputs, grad = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    mask = torch.zeros(3, 1, 9, 13, dtype=torch.float64)
    mask[:, :, :, 5:11] = -torch.inf
    given = (inputs[0], inputs[1], inputs[2]), mask if masked else None
    expected = attention_kernels.attend(*given, not masked, SCALE)
    found = attention_kernels.attend_on_cuda(*given, not masked, SCALE)
    whole = expected[0] * 0.5, expected[1] + 0.7  # as if merged with another block
    expected += attention_kernels.attend_backward(grad, *given, *whole, not masked, SCALE)
    found += attention_kernels.attend_on_cuda_backward(grad, *given, *whole, not masked, SCALE)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-9, rtol=0)
