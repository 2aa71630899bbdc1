"""Losses of preferences against numbers worked out by hand and TRL's, and derivatives against difference quotients."""

from __future__ import annotations

import math

import pytest
import torch

from learner.algorithm.preferences import DpoLoss, IpoLoss, OrpoLoss, Pairs, SimpoLoss, kto

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


@pytest.mark.parametrize(
    ("loss", "of_trl"),
    [
        (DpoLoss(beta=0.5), 0.31326168751822286),
        (IpoLoss(beta=0.5), 0.0625),
        (SimpoLoss(beta=2.0, margin=0.5), 0.2014132779827524),
        (OrpoLoss(weight=0.3), 1.5813175439834595),  # in single precision
    ],
)
def test_a_loss_is_what_trl_computes(loss: DpoLoss | IpoLoss | SimpoLoss | OrpoLoss, of_trl: float) -> None:
    """TRL 1.16.0's own functions on the same pair (SimPO and ORPO on its mean log-probabilities)."""
    assert loss(pairs())[0].item() == pytest.approx(of_trl, rel=1e-7)


GOOD = torch.tensor([True, True, False])
GAINS = (1.0, -1.0, -1.0)  # log-ratios of two good answers and a bad one


def of_kto(logprobs: tuple[float, ...], point: float) -> torch.Tensor:
    """Losses at reference log-probabilities of -7, -2 and -4."""
    reference_E = torch.tensor([-7.0, -2.0, -4.0], dtype=torch.float64)
    logprobs_E = torch.tensor(logprobs, dtype=torch.float64)
    return kto(logprobs_E, reference_E, GOOD, torch.tensor(point), 0.5, 1.5, 0.75)


@pytest.mark.parametrize(
    ("point", "of_trl"),
    [
        (0.5, [0.656735248671303, 1.0187680487630895, 0.24061597561845527]),
        (0.0, [0.566311003197218, 0.933688996802782, 0.283155501598609]),
    ],
)
def test_the_loss_of_kto_is_its_papers_and_what_trl_computes(point: float, of_trl: list[float]) -> None:
    """Recorded from TRL 1.16.0 with weights 1.5 of good and 0.75 of bad answers, beta 0.5."""
    found = of_kto((-6.0, -3.0, -5.0), point).tolist()
    assert found == pytest.approx(of_trl, rel=1e-12)
    by_hand = [
        weight / (1 + math.exp(sign * 0.5 * (gain - point)))
        for weight, sign, gain in zip((1.5, 1.5, 0.75), (1, 1, -1), GAINS, strict=True)
    ]
    assert found == pytest.approx(by_hand, rel=1e-12)


def test_the_gradient_of_kto_is_a_difference_quotient() -> None:
    logprobs_E = torch.tensor([-6.0, -3.0, -5.0], dtype=torch.float64, requires_grad=True)
    reference_E = torch.tensor([-7.0, -2.0, -4.0], dtype=torch.float64)
    (gradient_E,) = torch.autograd.grad(
        kto(logprobs_E, reference_E, GOOD, torch.tensor(0.5), 0.5, 1.5, 0.75).sum(), logprobs_E
    )
    for place, gradient in enumerate(gradient_E.tolist()):
        above, below = (
            of_kto(tuple(value + h * (at == place) for at, value in enumerate((-6.0, -3.0, -5.0))), 0.5).sum()
            for h in (1e-5, -1e-5)
        )
        assert gradient == pytest.approx(float(above - below) / 2e-5, rel=1e-6)
