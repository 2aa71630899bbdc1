from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from learner.losses import cross_entropy_loss, kl_k3, policy_loss

LOW, HIGH, CAP = 0.2, 0.28, 2.0
# (ratio pi/proximal, weight proximal/behavior, advantage, loss, d loss / d logprob, clipped, capped): by hand
CASES = [
    (1.0, 1.0, 1.0, -1.0, -1.0, 0, 0),
    (1.2, 1.0, 1.0, -1.2, -1.2, 0, 0),  # inside the upper clip
    (1.5, 1.0, 1.0, -1.28, 0.0, 1, 0),  # above it, and good: stopped
    (1.5, 1.0, -1.0, 1.5, 1.5, 0, 0),  # above it, and bad: pushed back
    (0.5, 1.0, 1.0, -0.5, -0.5, 0, 0),  # below, and good: pulled up
    (0.5, 1.0, -1.0, 0.8, 0.0, 1, 0),  # below, and bad: stopped
    (1.0, 1.5, 2.0, -3.0, -3.0, 0, 0),  # weighted
    (1.1, 5.0, 1.0, -2.2, -2.2, 0, 1),  # weight capped at 2
    (1.5, 0.5, 1.0, -0.64, 0.0, 1, 0),
    (1.5, 1.0, 0.0, 0.0, 0.0, 0, 0),
]


@pytest.mark.parametrize(("ratio", "weight", "advantage", "loss", "slope", "clipped", "capped"), CASES)
def test_policy_loss_equals_the_hand_computed_table(
    ratio: float, weight: float, advantage: float, loss: float, slope: float, clipped: int, capped: int
) -> None:
    behavior_T = torch.tensor([-1.3], dtype=torch.float64)
    proximal_T = behavior_T + math.log(weight)
    logprobs_T = (proximal_T + math.log(ratio)).requires_grad_()
    advantages_T = torch.tensor([advantage], dtype=torch.float64)
    loss_T, stats = policy_loss(logprobs_T, proximal_T, behavior_T, advantages_T, LOW, HIGH, CAP)
    loss_T.sum().backward()
    assert loss_T.item() == pytest.approx(loss, abs=1e-12)
    assert _grad(logprobs_T) == pytest.approx(slope, abs=1e-12)
    assert (stats["clipped"].item(), stats["tis_capped"].item()) == (clipped, capped)


def test_neither_weight_nor_proximal_policy_carries_gradient() -> None:
    logprobs_T, proximal_T, behavior_T = (torch.full((3,), x).requires_grad_() for x in (-1.0, -1.1, -1.2))
    loss_T, _ = policy_loss(logprobs_T, proximal_T, behavior_T, torch.ones(3), LOW, HIGH, CAP)
    loss_T.sum().backward()
    assert proximal_T.grad is None
    assert behavior_T.grad is None


def test_kl_k3_averages_to_the_true_divergence() -> None:
    behavior_V = torch.tensor([0.5, 0.3, 0.2]).double().log()
    policy_V = torch.tensor([0.2, 0.3, 0.5]).double().log()
    expected = (behavior_V.exp() * (behavior_V - policy_V)).sum()
    k3_V = kl_k3(policy_V, behavior_V)
    assert (behavior_V.exp() * k3_V).sum().item() == pytest.approx(expected.item())
    assert (k3_V >= 0).all()


def test_cross_entropy_is_the_negative_logprob() -> None:
    assert cross_entropy_loss(torch.tensor([-0.25, -2.0])).tolist() == [0.25, 2.0]


def _grad(tensor: Tensor) -> float:
    assert tensor.grad is not None
    return tensor.grad.item()
