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

_CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_CPU_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
_CUDA = torch.ops.aten._efficient_attention_forward
_CUDA_BACKWARD = torch.ops.aten._efficient_attention_backward
_ALIGNED = 16  # elements that a row of a mask must have a multiple of, on CUDA
_ALIGNED_LSE = 32  # the same of a row of log-sum-exps


def tree_attention(
    query_THD: Tensor, key_TKD: Tensor, value_TKD: Tensor, blocks: Blocks, scale: float | None
) -> Tensor:
    """Attention [T, H, D] over these blocks; H is a multiple of K. scale: None for 1 / sqrt(D).

    Values may be narrower than queries and keys, [T, K, E], and then the output is [T, H, E].
    """
    width, scale = query_THD.shape[-1], query_THD.shape[-1] ** -0.5 if scale is None else scale
    lacking = width - value_TKD.shape[-1]
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
        grads = [torch.zeros(x.shape, dtype=wide, device=x.device) for x in inputs]
        for block in (*ctx.blocks.own, *ctx.blocks.further):
            queries, keys = block.queries, block.keys
            grad = queries.take(grad_THD)
            if isinstance(queries, Gathered):
                grad = grad * queries.real_nL[:, None, :, None]
            found = _attend_backward(
                block,
                grad,
                (queries.take(query_THD), keys.take(key_TKD), keys.take(value_TKD)),
                queries.take(out_THD),
                queries.take(lse_TH1)[..., 0],
                ctx.scale,
            )
            for total, span, part in zip(grads, (queries, keys, keys), found, strict=True):
                span.add(total, part.to(wide))
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
    query, key, value = block.queries.take(query_THD), block.keys.take(key_TKD), block.keys.take(value_TKD)
    if not query.is_cuda:
        out, lse = _CPU(query, key, value, 0.0, block.causal, attn_mask=block.mask, scale=scale)
        return out, lse
    inputs_LHD = _for_each_head(query, key, value)
    mask = _aligned(block.mask, query)
    causal = int(block.causal)  # from the first query and key on
    out_nLHD, lse, *_ = _CUDA(*inputs_LHD, mask, None, None, None, None, 0.0, causal, True, scale=scale)
    return out_nLHD.transpose(1, 2), lse[..., : query.shape[2]]


def _attend_backward(
    block: Block, grad: Tensor, inputs: tuple[Tensor, Tensor, Tensor], out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value, where out and lse are the merged ones."""
    query, key, value = inputs
    if not query.is_cuda:
        found: tuple[Tensor, Tensor, Tensor] = _CPU_BACKWARD(
            grad, query, key, value, out, lse, 0.0, block.causal, attn_mask=block.mask, scale=scale
        )
        return found
    # The state of a generator, which nothing is drawn from: there is no dropout.
    none = torch.zeros((), dtype=torch.int64, device=query.device)
    of_query, of_keys, of_values, _ = _CUDA_BACKWARD(
        grad.transpose(1, 2),
        *_for_each_head(query, key, value),
        _aligned(block.mask, query),
        out.transpose(1, 2),
        None,
        None,
        query.shape[2],
        key.shape[2],
        pad(lse, (0, -lse.shape[2] % _ALIGNED_LSE), value=float("inf")),
        0.0,
        none,
        none,
        int(block.causal),
        False,
        scale=scale,
    )
    return of_query.transpose(1, 2), _of_groups(of_keys, key), _of_groups(of_values, value)


def _for_each_head(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The inputs of CUDA's kernel: [n, L, H, D], keys and values repeated for all heads of their group."""
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)


def _of_groups(grad_nWHD: Tensor, shared: Tensor) -> Tensor:
    """Gradients of repeated keys or values, summed over the heads of each group: [n, K, W, D]."""
    return grad_nWHD.transpose(1, 2).unflatten(1, (shared.shape[1], -1)).sum(2)


def _aligned(mask: Tensor | None, query: Tensor) -> Tensor | None:
    """The mask for every head [n, H, L, W], in the query's type, where rows begin at multiples of _ALIGNED."""
    if mask is None:
        return None
    width = mask.shape[-1]
    padded = pad(mask.to(query.dtype), (0, -width % _ALIGNED))
    return padded[..., :width].expand(-1, query.shape[1], -1, -1)
