"""Divergence over the vocabulary, in chunks, is the dense one: values by hand, gradients by autograd and torch."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from learner.model.divergence import Direction, Head, Opposite, divergence


def head(logits_V: Tensor) -> Head:
    """One hidden state before which a vocabulary has these logits."""
    return Head(torch.ones(1, 1, dtype=torch.float64), logits_V[:, None], None)


@pytest.mark.parametrize(("direction", "halvings"), [("reverse", 0.625), ("forward", 0.5)])
@pytest.mark.parametrize("chunk", [1, 3, 8])
def test_known_distributions_diverge_as_computed_by_hand(
    direction: Direction, halvings: float, chunk: int
) -> None:
    # reverse: 1/2 * 2 - 1/4 - 1/8 halvings; forward: -1/8 * 2 + 1/2 + 1/4.
    own, other = (
        head(torch.tensor(p, dtype=torch.float64).log()) for p in ([4, 2, 1, 1], [0.125, 0.5, 0.25, 0.125])
    )
    found_1 = divergence(own, Opposite(other, direction), vocab_chunk=chunk)
    assert found_1.item() == pytest.approx(halvings * math.log(2), abs=1e-12)


@pytest.mark.parametrize("direction", ["reverse", "forward"])
@pytest.mark.parametrize("chunk", [4, 64])
def test_values_and_gradients_are_those_of_the_dense_divergence(direction: Direction, chunk: int) -> None:
    """The teacher's vocabulary is padded further than the student's, and one token can never be sampled."""
    torch.manual_seed(0)
    tokens, width, entries, temperature = 5, 6, 13, 0.7

    def parts(vocabulary: int, size: int) -> list[Tensor]:
        made = [torch.randn(tokens, size), torch.randn(vocabulary, size), torch.randn(vocabulary)]
        return [part.double().requires_grad_() for part in made]

    own, other = parts(entries, width), parts(entries + 3, width + 2)
    never_V = torch.zeros(entries, dtype=torch.float64)
    never_V[4] = -1e4
    weight_T = torch.rand(tokens, dtype=torch.float64)

    def dense() -> Tensor:
        of_own = (nn.functional.linear(*own) + never_V) / temperature
        of_other = (nn.functional.linear(*other)[:, :entries] + never_V) / temperature
        own_TV, other_TV = of_own.log_softmax(-1), of_other.detach().log_softmax(-1)
        target, said = (own_TV, other_TV) if direction == "reverse" else (other_TV, own_TV)
        return nn.functional.kl_div(said, target, reduction="none", log_target=True).sum(-1)

    student = Head(own[0], own[1], own[2] + never_V)
    padded_V = torch.cat([never_V, torch.zeros(3)])
    teacher = Head(*(part.detach() for part in (other[0], other[1], other[2] + padded_V)))
    found_T = divergence(student, Opposite(teacher, direction), temperature, chunk)
    expected_T = dense()
    torch.testing.assert_close(found_T, expected_T, rtol=1e-10, atol=1e-12)
    grads, expected = (torch.autograd.grad((x * weight_T).sum(), own) for x in (found_T, expected_T))
    torch.testing.assert_close(grads, expected, rtol=1e-9, atol=1e-12)
