"""Attention of a packed row over the blocks of its prefix tree, with exact gradients.

Each block gives an output and the log of its softmax's denominator. Outputs of one query over several sets of keys are
merged with the weights exp(lse_i - lse), lse = log sum_i exp(lse_i) (Milakov & Gimelshein 2018; Ring Attention, Liu et
al. 2023). The probability of a key is p = exp(score - lse) in whichever block it is, and the gradient of its score is
p * (dout . v - dout . out): the backward kernel of a block, given the merged output and the merged lse, returns its
share of the exact gradients. No gradient flows through a block's own lse.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from learner.model.attention_blocks import Block, Blocks, Gathered, Range
from learner.model.attention_kernels import Inputs, attend, attend_backward


def tree_attention(
    query_THD: Tensor, key_TKD: Tensor, value_TKD: Tensor, blocks: Blocks, scale: float | None
) -> Tensor:
    """Attention [T, H, D] over these blocks; H is a multiple of K. scale: None for 1 / sqrt(D).

    Values may be narrower than queries and keys, [T, K, E], and then the output is [T, H, E].
    """
    width, scale = query_THD.shape[-1], query_THD.shape[-1] ** -0.5 if scale is None else scale
    lacking = width - value_TKD.shape[-1]
    if lacking < 0:
        raise ValueError(f"values of {value_TKD.shape[-1]} numbers are wider than queries of {width}")
    value_TKD = pad(value_TKD, (0, lacking)) if lacking else value_TKD
    out_THD: Tensor = _TreeAttention.apply(query_THD, key_TKD, value_TKD, blocks, scale)
    return out_THD[..., : width - lacking] if lacking else out_THD


class _TreeAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query_THD: Tensor, key_TKD: Tensor, value_TKD: Tensor, blocks: Blocks, scale: float
    ) -> Tensor:
        wide = torch.promote_types(query_THD.dtype, torch.float32)
        out_THD = torch.empty(
            query_THD.shape, dtype=wide if blocks.further else query_THD.dtype, device=query_THD.device
        )
        lse_TH1 = torch.empty((*query_THD.shape[:2], 1), dtype=wide, device=query_THD.device)
        for block in blocks.own:
            out, lse = _attend(block, query_THD, key_TKD, value_TKD, scale)
            block.queries.store(out_THD, out)
            block.queries.store(lse_TH1, lse[..., None])
        for block in blocks.further:
            _merge(block, out_THD, lse_TH1, *_attend(block, query_THD, key_TKD, value_TKD, scale))
        out_THD = out_THD.to(query_THD.dtype)
        ctx.save_for_backward(query_THD, key_TKD, value_TKD, out_THD, lse_TH1)
        ctx.blocks, ctx.scale = blocks, scale
        return out_THD

    @staticmethod
    def backward(ctx: Any, grad_THD: Tensor) -> tuple[Any, ...]:
        query_THD, key_TKD, value_TKD, out_THD, lse_TH1 = ctx.saved_tensors
        inputs = query_THD, key_TKD, value_TKD
        wide = torch.promote_types(query_THD.dtype, torch.float32)
        if ctx.blocks.apart:  # every token is in one block only: nothing is summed
            grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in inputs]
        else:
            grads = [torch.zeros(x.shape, dtype=wide, device=x.device) for x in inputs]
        for block in (*ctx.blocks.own, *ctx.blocks.further):
            queries, keys = block.queries, block.keys
            grad = queries.take(grad_THD)
            if isinstance(queries, Gathered):
                grad = grad * queries.real_nL[:, None, :, None]
            found = attend_backward(
                grad,
                _inputs(block, *inputs),
                block.mask,
                queries.take(out_THD),
                queries.take(lse_TH1)[..., 0],
                block.causal,
                ctx.scale,
            )
            for total, span, part in zip(grads, (queries, keys, keys), found, strict=True):
                (span.store if ctx.blocks.apart else span.add)(total, part.to(total.dtype))
        return *(total.to(x.dtype) for total, x in zip(grads, inputs, strict=True)), None, None


def _merge(block: Block, out_THD: Tensor, lse_TH1: Tensor, out: Tensor, lse: Tensor) -> None:
    """Add what the block's queries see there to what they have seen so far."""
    assert isinstance(block.queries, Range)
    seen, seen_lse = block.queries.take(out_THD), block.queries.take(lse_TH1)
    merged = torch.logaddexp(seen_lse, lse[..., None])
    seen.mul_((seen_lse - merged).exp()).add_(out * (lse[..., None] - merged).exp())
    seen_lse.copy_(merged)


def _attend(
    block: Block, query_THD: Tensor, key_TKD: Tensor, value_TKD: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """A block's output [n, H, L, D] and log-sum-exp [n, H, L]."""
    return attend(_inputs(block, query_THD, key_TKD, value_TKD), block.mask, block.causal, scale)


def _inputs(block: Block, query_THD: Tensor, key_TKD: Tensor, value_TKD: Tensor) -> Inputs:
    return block.queries.take(query_THD), block.keys.take(key_TKD), block.keys.take(value_TKD)
