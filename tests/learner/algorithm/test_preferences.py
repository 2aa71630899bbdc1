"""Losses of preferences against numbers worked out by hand, and their derivatives against difference quotients."""

from __future__ import annotations

import math

import pytest
import torch

from learner.algorithm.preferences import DpoLoss, IpoLoss, OrpoLoss, Pairs, SimpoLoss

# One pair: chosen of 4 tokens, rejected of 2; log-probabilities of policy and reference.
NUMBERS = {
    "chosen": -6.0,
    "rejected": -5.0,
    "reference_chosen": -7.0,
    "reference_rejected": -4.0,
    "chosen_tokens": 4.0,
    "rejected_tokens": 2.0,
}


def pairs(**changed: float) -> Pairs:
    held = {name: torch.tensor([value], dtype=torch.float64) for name, value in (NUMBERS | changed).items()}
    held["chosen"].requires_grad_()
    held["rejected"].requires_grad_()
    return Pairs(**held)


def log1pexp(x: float) -> float:
    return math.log(1 + math.exp(x))


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        # h = (-6 + 7) - (-5 + 4) = 2
        (DpoLoss(beta=0.5), log1pexp(-1.0)),
        (DpoLoss(beta=0.5, label_smoothing=0.1), 0.9 * log1pexp(-1.0) + 0.1 * log1pexp(1.0)),
        # means: 1/4 - (-1/2) = 0.75; the margin aimed at is 1 / (2 * 0.5) = 1
        (IpoLoss(beta=0.5), 0.0625),
        # means -1.5 and -2.5: 2 * 1.0 - 0.5
        (SimpoLoss(beta=2.0, margin=0.5), log1pexp(-1.5)),
        # 1.5 + 0.3 * log(1 + exp(-(log odds(e^-1.5) - log odds(e^-2.5))))
        (
            OrpoLoss(weight=0.3),
            1.5
            + 0.3
            * log1pexp(
                -(
                    math.log(math.exp(-1.5) / (1 - math.exp(-1.5)))
                    - math.log(math.exp(-2.5) / (1 - math.exp(-2.5)))
                )
            ),
        ),
    ],
)
def test_a_loss_is_its_papers_number(loss: DpoLoss | IpoLoss | SimpoLoss | OrpoLoss, expected: float) -> None:
    value_P, _ = loss(pairs())
    assert value_P.tolist() == [pytest.approx(expected, rel=1e-12)]


@pytest.mark.parametrize("loss", [DpoLoss(label_smoothing=0.2), IpoLoss(), SimpoLoss(), OrpoLoss()])
def test_a_gradient_is_a_difference_quotient(loss: DpoLoss | IpoLoss | SimpoLoss | OrpoLoss) -> None:
    held = pairs()
    loss(held)[0].sum().backward()
    for name, gradient in (("chosen", held.chosen.grad), ("rejected", held.rejected.grad)):
        above, below = (loss(pairs(**{name: NUMBERS[name] + h}))[0].item() for h in (1e-5, -1e-5))
        assert gradient is not None
        assert float(gradient) == pytest.approx((above - below) / 2e-5, rel=1e-6)


def test_implicit_rewards_are_what_the_policy_moved() -> None:
    _, statistics = DpoLoss(beta=0.5)(pairs())
    assert {name: float(value_P) for name, value_P in statistics.items()} == {
        "chosen_reward": 0.5,
        "rejected_reward": -0.5,
        "reward_margin": 1.0,
        "reward_accuracy": 1.0,
    }
