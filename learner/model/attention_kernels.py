"""torch's fused attention with its log-sum-exp, and its backward pass for an output that was merged from several.

[n, H, L, D] queries, [n, K, W, D] keys and values with H a multiple of K, a causal mask (query i sees keys up to i) or
one to add, [n, 1, L, W] in the type of the queries. On CUDA it is the memory-efficient kernel: it takes masks, float32
and half precision, and any architecture.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

_CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_CPU_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
_CUDA = torch.ops.aten._efficient_attention_forward
_CUDA_BACKWARD = torch.ops.aten._efficient_attention_backward
_ALIGNED = 16  # elements that a row of a mask must have a multiple of, on CUDA
_ALIGNED_LSE = 32  # the same of a row of log-sum-exps
Inputs = tuple[Tensor, Tensor, Tensor]


def attend(inputs: Inputs, mask: Tensor | None, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Output [n, H, L, D] and log-sum-exp [n, H, L] of the scores."""
    return (attend_on_cuda if inputs[0].is_cuda else _attend_on_cpu)(inputs, mask, causal, scale)


def attend_backward(
    grad: Tensor, inputs: Inputs, mask: Tensor | None, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> Inputs:
    """The gradients of query, key and value; out, lse and grad: of the merged output."""
    backward = attend_on_cuda_backward if inputs[0].is_cuda else _attend_on_cpu_backward
    return backward(grad, inputs, mask, out, lse, causal, scale)


def _attend_on_cpu(inputs: Inputs, mask: Tensor | None, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    out, lse = _CPU(*inputs, 0.0, causal, attn_mask=mask, scale=scale)
    return out, lse


def _attend_on_cpu_backward(
    grad: Tensor, inputs: Inputs, mask: Tensor | None, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> Inputs:
    # Of bfloat16 the kernel repacks every block: 16 ms for twenty tiles of 32 x 64 with nine heads, 4 ms in float32.
    query, key, value, grad, out = (x.to(lse.dtype) for x in (*inputs, grad, out))
    wide = None if mask is None else mask.to(lse.dtype)
    found: Inputs = _CPU_BACKWARD(grad, query, key, value, out, lse, 0.0, causal, attn_mask=wide, scale=scale)
    return found


def attend_on_cuda(inputs: Inputs, mask: Tensor | None, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """`attend` by the memory-efficient kernel."""
    query, key, value = _for_each_head(*inputs)
    bias = _aligned(mask, inputs[0])
    out_nLHD, lse, *_ = _CUDA(
        query, key, value, bias, None, None, None, None, 0.0, int(causal), True, scale=scale
    )
    return out_nLHD.transpose(1, 2), lse[..., : query.shape[1]]


def attend_on_cuda_backward(
    grad: Tensor, inputs: Inputs, mask: Tensor | None, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> Inputs:
    """`attend_backward` by the memory-efficient kernel."""
    query, key, value = inputs
    # The state of a generator, which nothing is drawn from: there is no dropout.
    none = torch.zeros((), dtype=torch.int64, device=query.device)
    of_query, of_keys, of_values, _ = _CUDA_BACKWARD(
        grad.transpose(1, 2),
        *_for_each_head(query, key, value),
        _aligned(mask, query),
        out.transpose(1, 2),
        None,
        None,
        query.shape[2],
        key.shape[2],
        pad(lse, (0, -lse.shape[2] % _ALIGNED_LSE), value=float("inf")),
        0.0,
        none,
        none,
        int(causal),
        False,
        scale=scale,
    )
    return of_query.transpose(1, 2), _of_groups(of_keys, key), _of_groups(of_values, value)


def _for_each_head(query: Tensor, key: Tensor, value: Tensor) -> Inputs:
    """The inputs of CUDA's kernel: [n, L, H, D], keys and values repeated for all heads of their group."""
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)


def _of_groups(grad_nWHD: Tensor, shared: Tensor) -> Tensor:
    """Gradients of repeated keys or values, summed over the heads of each group: [n, K, W, D]."""
    return grad_nWHD.transpose(1, 2).unflatten(1, (shared.shape[1], -1)).sum(2)


def _aligned(mask: Tensor | None, query: Tensor) -> Tensor | None:
    """The mask for every head [n, H, L, W], whose rows begin at multiples of _ALIGNED."""
    if mask is None:
        return None
    width = mask.shape[-1]
    padded = pad(mask, (0, -width % _ALIGNED))
    return padded[..., :width].expand(-1, query.shape[1], -1, -1)
