"""Kullback-Leibler divergence between what two models say of the next token, over the whole vocabulary.

As in logprobs.py no [T, V] matrix is held: both normalizers are found chunk by chunk of the vocabulary, and the
backward pass computes each chunk of logits again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from learner.model.logprobs import chunk_logits, chunks, head_gradients, log_normalizer, wide

Direction = Literal["reverse", "forward"]


class Head(NamedTuple):
    """What a model says of the next token: softmax((hidden @ weight.T + bias) / temperature).

    hidden_TD [T, D]; weight_VD [V, D]; bias_V [V] or None.
    """

    hidden_TD: Tensor
    weight_VD: Tensor
    bias_V: Tensor | None

    def first(self, entries: int) -> Head:
        """The same over the first entries of the vocabulary alone."""
        bias_V = None if self.bias_V is None else self.bias_V[:entries]
        return Head(self.hidden_TD, self.weight_VD[:entries], bias_V)


class Opposite(NamedTuple):
    """What a divergence is from: a head that is a constant, and the direction.

    KL(policy || it) if `reverse`, KL(it || policy) if `forward`.
    """

    head: Head
    direction: Direction


def divergence(own: Head, against: Opposite, temperature: float = 1.0, vocab_chunk: int = 8192) -> Tensor:
    """Divergence at each place: [T], nats, float32 (or float64), differentiable in all of `own`.

    Vocabularies that are padded to different sizes are compared over the entries that both have.
    """
    other, direction = against
    entries = min(len(own.weight_VD), len(other.weight_VD))
    kl_T: Tensor = _Divergence.apply(
        *own.first(entries), other.first(entries), direction, temperature, vocab_chunk
    )
    return kl_T


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        other: Head,
        direction: Direction,
        temperature: float,
        vocab_chunk: int,
    ) -> Tensor:
        ctx.other, ctx.direction, ctx.temperature, ctx.vocab_chunk = (
            other,
            direction,
            temperature,
            vocab_chunk,
        )
        own = Head(hidden_TD, weight_VD, bias_V)
        normalizers = tuple(log_normalizer(*each, temperature, vocab_chunk) for each in (own, other))
        kl_T = torch.zeros(len(hidden_TD), dtype=wide(hidden_TD), device=hidden_TD.device)
        for own_TC, other_TC in _logprobs(ctx, own, normalizers):
            said_TC, apart_TC = (own_TC, own_TC - other_TC)
            if direction == "forward":
                said_TC, apart_TC = other_TC, -apart_TC
            kl_T += (said_TC.exp() * apart_TC).sum(1)
        ctx.save_for_backward(hidden_TD, weight_VD, bias_V, kl_T, *normalizers)
        return kl_T

    @staticmethod
    def backward(ctx: Any, kl_grad_T: Tensor) -> tuple[Any, ...]:
        hidden_TD, weight_VD, bias_V, kl_T, *normalizers = ctx.saved_tensors

        def grads() -> Iterator[Tensor]:
            """With p the policy's and q the other's: p (log p - log q - KL), or p - q."""
            for own_TC, other_TC in _logprobs(ctx, Head(hidden_TD, weight_VD, bias_V), tuple(normalizers)):
                if ctx.direction == "forward":
                    yield (own_TC.exp() - other_TC.exp()) * kl_grad_T[:, None]
                else:
                    yield own_TC.exp() * (own_TC - other_TC - kl_T[:, None]) * kl_grad_T[:, None]

        return *head_gradients(ctx, hidden_TD, weight_VD, bias_V, grads()), None, None, None, None


def _logprobs(ctx: Any, own: Head, normalizers: tuple[Tensor, ...]) -> Iterator[tuple[Tensor, Tensor]]:
    """Logprobs [T, C] of both, one chunk of the vocabulary after another."""
    heads: tuple[Head, Head] = (own, ctx.other)
    for chunk in chunks(own.weight_VD, ctx.vocab_chunk):
        own_TC, other_TC = (
            chunk_logits(head.hidden_TD, head.weight_VD, head.bias_V, chunk, ctx.temperature).sub_(
                normalizer_T[:, None]
            )
            for head, normalizer_T in zip(heads, normalizers, strict=True)
        )
        yield own_TC, other_TC
