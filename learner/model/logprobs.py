"""Log-probabilities and entropies of tokens without a [T, V] matrix in memory.

The head's matrix product, the softmax and their gradients are computed in chunks of the vocabulary: the forward pass
keeps one online log-sum-exp per token (Milakov & Gimelshein 2018), the backward pass recomputes each chunk of logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


def token_logprobs(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    targets_T: Tensor,
    temperature: float = 1.0,
    vocab_chunk: int = 8192,
) -> tuple[Tensor, Tensor]:
    """Logprob of each target and entropy of its distribution, softmax((hidden @ weight.T + bias) / temp).

    hidden_TD float [T, D]; weight_VD [V, D]; bias_V [V] or None; targets_T int64 [T]. Returns logprobs [T]
    and entropies [T] in nats, float32 (float64 for float64 inputs), both differentiable in hidden, weight and
    bias. bfloat16 hidden states are multiplied as bfloat16 but accumulated in float32; their gradients are
    products of bfloat16. Beyond inputs and gradients the memory is a few [T, vocab_chunk] blocks.
    """
    return _TokenLogprobs.apply(hidden_TD, weight_VD, bias_V, targets_T, temperature, vocab_chunk)


def wide(tensor: Tensor) -> torch.dtype:
    """The type in which products of these are accumulated."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """left @ right accumulated and returned in `dtype`; CUDA multiplies narrower factors without conversion."""
    if left.dtype == dtype and right.dtype == dtype:
        return left @ right
    if left.is_cuda and left.dtype == right.dtype:
        return torch.mm(left, right, out_dtype=dtype)
    return left.to(dtype) @ right.to(dtype)


def _gradient(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """The same for a gradient, which the backward pass of any layer rounds to its factors' type.

    CPUs cannot return a product of narrower factors in another type, and multiply wide ones at less than half the rate.
    """
    return _product(left, right, dtype) if left.is_cuda else (left @ right).to(dtype)


def chunk_logits(
    hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, chunk: slice, temperature: float
) -> Tensor:
    """Logits [T, C] of one chunk of the vocabulary, divided by the temperature, in wide floats."""
    logits_TC = _product(hidden_TD, weight_VD[chunk].to(hidden_TD.dtype).T, wide(hidden_TD))
    if bias_V is not None:
        logits_TC += bias_V[chunk]
    return logits_TC if temperature == 1.0 else logits_TC.div_(temperature)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        targets_T: Tensor,
        temperature: float,
        vocab_chunk: int,
    ) -> tuple[Tensor, Tensor]:
        target_T, normalizer_T, entropy_T = _online_softmax(
            hidden_TD, weight_VD, bias_V, targets_T, temperature, vocab_chunk
        )
        ctx.save_for_backward(hidden_TD, weight_VD, bias_V, targets_T, normalizer_T, entropy_T)
        ctx.temperature, ctx.vocab_chunk = temperature, vocab_chunk
        ctx.set_materialize_grads(False)
        return target_T - normalizer_T, entropy_T

    @staticmethod
    def backward(ctx: Any, logprob_grad_T: Tensor | None, entropy_grad_T: Tensor | None) -> tuple[Any, ...]:
        hidden_TD, weight_VD, bias_V, targets_T, normalizer_T, entropy_T = ctx.saved_tensors

        def grads() -> Iterator[Tensor]:
            for chunk in chunks(weight_VD, ctx.vocab_chunk):
                logits_TC = chunk_logits(hidden_TD, weight_VD, bias_V, chunk, ctx.temperature)
                logprobs_TC = logits_TC.sub_(normalizer_T[:, None])
                yield _logit_grads(
                    logprobs_TC, targets_T - chunk.start, entropy_T, logprob_grad_T, entropy_grad_T
                )

        return *head_gradients(ctx, hidden_TD, weight_VD, bias_V, grads()), None, None, None


def head_gradients(
    ctx: Any, hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, grads: Iterator[Tensor]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of a head's three inputs, from those of its logits divided by the temperature, [T, C] a chunk.

    ctx: of an autograd function with these as its first inputs, and with `temperature` and `vocab_chunk`.
    """
    accumulated = wide(hidden_TD)
    hidden_grad_TD = torch.zeros_like(hidden_TD, dtype=accumulated)
    weight_grad_VD = torch.empty_like(weight_VD) if ctx.needs_input_grad[1] else None
    bias_grad_V = torch.empty_like(bias_V) if bias_V is not None and ctx.needs_input_grad[2] else None
    for chunk, grad_TC in zip(chunks(weight_VD, ctx.vocab_chunk), grads, strict=True):
        if ctx.temperature != 1.0:
            grad_TC /= ctx.temperature
        if bias_grad_V is not None:
            bias_grad_V[chunk] = grad_TC.sum(0)
        narrow_TC = grad_TC.to(hidden_TD.dtype)
        hidden_grad_TD += _gradient(narrow_TC, weight_VD[chunk].to(hidden_TD.dtype), accumulated)
        if weight_grad_VD is not None:
            weight_grad_VD[chunk] = _gradient(narrow_TC.T, hidden_TD, accumulated)
    return hidden_grad_TD.to(hidden_TD.dtype), weight_grad_VD, bias_grad_V


def chunks(weight_VD: Tensor, vocab_chunk: int) -> Iterator[slice]:
    """The vocabulary in parts."""
    for start in range(0, len(weight_VD), vocab_chunk):
        yield slice(start, start + vocab_chunk)


def log_normalizer(
    hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, temperature: float, vocab_chunk: int
) -> Tensor:
    """Log of the softmax's denominator, [T] in wide floats."""
    nothing_T = torch.zeros(len(hidden_TD), dtype=torch.int64, device=hidden_TD.device)
    return _online_softmax(hidden_TD, weight_VD, bias_V, nothing_T, temperature, vocab_chunk)[1]


def _online_softmax(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    targets_T: Tensor,
    temperature: float,
    vocab_chunk: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Logit of the target, log of the softmax's denominator, and entropy: [T] each, chunk by chunk.

    With z the logits and m their maximum so far, sum_T is the sum of exp(z - m) and moment_T that of
    exp(z - m) * (z - m): the entropy is log(sum) - moment / sum.
    """
    accumulated = wide(hidden_TD)
    target_T, sum_T, moment_T = hidden_TD.new_zeros(3, len(targets_T), dtype=accumulated)
    # Finite: the first chunk's rescaling then multiplies zeros by zero.
    maximum_T = torch.full_like(sum_T, torch.finfo(accumulated).min / 2)
    for chunk in chunks(weight_VD, vocab_chunk):
        logits_TC = chunk_logits(hidden_TD, weight_VD, bias_V, chunk, temperature)
        picked_T, inside_T = _pick(logits_TC, targets_T - chunk.start)
        target_T = torch.where(inside_T, picked_T, target_T)
        highest_T = torch.maximum(maximum_T, logits_TC.amax(1))
        shift_T = maximum_T - highest_T
        logits_TC -= highest_T[:, None]
        weights_TC = logits_TC.exp()
        scale_T = shift_T.exp()
        moment_T = (moment_T + shift_T * sum_T) * scale_T
        sum_T = sum_T * scale_T + weights_TC.sum(1)
        moment_T = moment_T + weights_TC.mul_(logits_TC).sum(1)
        maximum_T = highest_T
    log_sum_T = sum_T.log()
    return target_T, maximum_T + log_sum_T, log_sum_T - moment_T / sum_T


def _pick(logits_TC: Tensor, local_T: Tensor) -> tuple[Tensor, Tensor]:
    """The logit at each token's target, and whether the target is in this chunk (otherwise the logit is junk)."""
    width = logits_TC.shape[1]
    inside_T = (local_T >= 0) & (local_T < width)
    return logits_TC.gather(1, local_T.clamp(0, width - 1)[:, None])[:, 0], inside_T


def _logit_grads(
    logprobs_TC: Tensor,
    local_T: Tensor,
    entropy_T: Tensor,
    logprob_grad_T: Tensor | None,
    entropy_grad_T: Tensor | None,
) -> Tensor:
    """d(loss)/d(logits) [T, C]: with p the probabilities and H the entropy,

    d logprob / d z = onehot(target) - p and d H / d z = -p * (log p + H).
    """
    probs_TC = logprobs_TC.exp()
    grad_TC = torch.zeros_like(probs_TC)
    if entropy_grad_T is not None:
        grad_TC -= probs_TC * (logprobs_TC + entropy_T[:, None]) * entropy_grad_T[:, None]
    if logprob_grad_T is not None:
        grad_TC -= probs_TC * logprob_grad_T[:, None]
        width = probs_TC.shape[1]
        inside_T = (local_T >= 0) & (local_T < width)
        grad_TC.scatter_add_(1, local_T.clamp(0, width - 1)[:, None], (logprob_grad_T * inside_T)[:, None])
    return grad_TC
