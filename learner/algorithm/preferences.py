"""Losses of preferences: a better answer against a worse one, or answers that are good or bad. Pure functions.

Tensors are [P] over pairs or [E] over single answers; log-probabilities are in nats, summed over the tokens of an
answer. A loss is not reduced. Those of pairs return statistics besides; each is a section of the recipe, chosen by
`kind`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import BaseModel, Field
from torch import Tensor
from torch.nn.functional import logsigmoid

PreferenceValue = tuple[Tensor, dict[str, Tensor]]  # [P] with gradient; statistics [P] without


@dataclass(frozen=True, slots=True)
class Pairs:
    """Pairs of answers, [P] each. The policy's log-probabilities carry gradient, the reference's do not."""

    chosen: Tensor
    rejected: Tensor
    reference_chosen: Tensor
    reference_rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor


def dpo(pairs: Pairs, beta: float, label_smoothing: float = 0.0) -> PreferenceValue:
    """-log sigma(beta h), h = log(pi/ref)(chosen) - log(pi/ref)(rejected): Rafailov et al. 2023, equation 7.

    label_smoothing: the probability that a label is wrong (conservative DPO, Mitchell 2023): the loss is the
    expectation over both orders.
    """
    margin_P = beta * (
        _gain(pairs.chosen, pairs.reference_chosen) - _gain(pairs.rejected, pairs.reference_rejected)
    )
    loss_P = -(1 - label_smoothing) * logsigmoid(margin_P) - label_smoothing * logsigmoid(-margin_P)
    return loss_P, _implicit_rewards(pairs, beta)


def ipo(pairs: Pairs, beta: float) -> PreferenceValue:
    """(h - 1 / (2 beta))^2 with log-ratios averaged over an answer's tokens: Azar et al. 2023, equation 17.

    The average in place of the sum is the authors' correction for answers of unequal length.
    """
    chosen_P = _gain(pairs.chosen, pairs.reference_chosen) / pairs.chosen_tokens
    rejected_P = _gain(pairs.rejected, pairs.reference_rejected) / pairs.rejected_tokens
    return (chosen_P - rejected_P - 1 / (2 * beta)).square(), _implicit_rewards(pairs, beta)


def simpo(pairs: Pairs, beta: float, margin: float) -> PreferenceValue:
    """-log sigma(beta (mean log pi(chosen) - mean log pi(rejected)) - margin): Meng et al. 2024, equation 6.

    There is no reference.
    """
    chosen_P = beta * pairs.chosen / pairs.chosen_tokens
    rejected_P = beta * pairs.rejected / pairs.rejected_tokens
    return -logsigmoid(chosen_P - rejected_P - margin), _rewards(chosen_P, rejected_P)


def orpo(pairs: Pairs, weight: float) -> PreferenceValue:
    """Mean negative log-likelihood of the chosen answer plus weight times -log sigma of the log odds ratio.

    Hong et al. 2024, equations 3 to 7; the odds are of an answer's mean probability p = exp(mean log pi), log odds =
    log p - log(1 - p). There is no reference.
    """
    chosen_P = pairs.chosen / pairs.chosen_tokens
    rejected_P = pairs.rejected / pairs.rejected_tokens
    odds_P = _log_odds(chosen_P) - _log_odds(rejected_P)
    return -chosen_P - weight * logsigmoid(odds_P), _rewards(weight * chosen_P, weight * rejected_P)


def kto(
    logprobs_E: Tensor,
    reference_E: Tensor,
    desirable_E: Tensor,
    point: Tensor,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """w (1 - sigma(+-beta (log(pi/ref) - z))), + for desirable answers: Ethayarajh et al. 2024.

    desirable_E: bool. point: z, one number of 0 or more, the divergence from the reference, without gradient.
    """
    sign_E = torch.where(desirable_E, 1.0, -1.0).to(logprobs_E.dtype)
    weight_E = torch.where(desirable_E, desirable_weight, undesirable_weight).to(logprobs_E.dtype)
    return weight_E * (1 - torch.sigmoid(sign_E * beta * (_gain(logprobs_E, reference_E) - point)))


def bradley_terry(
    chosen_P: Tensor, rejected_P: Tensor, margin_P: Tensor, centre: float = 0.0
) -> PreferenceValue:
    """-log sigma(r(chosen) - r(rejected) - margin) + centre (r(chosen) + r(rejected))^2, of rewards r.

    Bradley and Terry 1952; with a margin as in Touvron et al. 2023 (Llama 2), section 3.2.2. The second term keeps
    rewards around 0, which pairs alone leave open.
    """
    loss_P = -logsigmoid(chosen_P - rejected_P - margin_P) + centre * (chosen_P + rejected_P).square()
    return loss_P, _rewards(chosen_P, rejected_P)


def _gain(logprobs_P: Tensor, reference_P: Tensor) -> Tensor:
    return logprobs_P - reference_P


def _log_odds(mean_P: Tensor) -> Tensor:
    # A probability of exactly 1 has no odds: it is kept below by the smallest step of float64 that matters.
    return mean_P - torch.log1p(-mean_P.clamp(max=-1e-12).exp())


def _implicit_rewards(pairs: Pairs, beta: float) -> dict[str, Tensor]:
    """The rewards that the policy stands for: beta log(pi/ref), Rafailov et al. 2023, section 4."""
    return _rewards(
        beta * _gain(pairs.chosen, pairs.reference_chosen),
        beta * _gain(pairs.rejected, pairs.reference_rejected),
    )


def _rewards(chosen_P: Tensor, rejected_P: Tensor) -> dict[str, Tensor]:
    chosen_P, rejected_P = chosen_P.detach(), rejected_P.detach()
    return {
        "chosen_reward": chosen_P,
        "rejected_reward": rejected_P,
        "reward_margin": chosen_P - rejected_P,
        "reward_accuracy": (chosen_P > rejected_P).to(chosen_P.dtype),
    }


class _PreferenceLoss(BaseModel, extra="forbid", frozen=True):
    has_reference: ClassVar[bool] = True


def _beta(default: float, description: str) -> float:
    field: float = Field(default=default, gt=0, description=description)
    return field


class DpoLoss(_PreferenceLoss):
    """Direct preference optimization."""

    kind: Literal["dpo"] = "dpo"
    beta: float = _beta(0.1, "how strongly the policy is held to the reference; smaller lets it go further")
    label_smoothing: float = Field(
        default=0.0, ge=0, lt=0.5, description="probability that a label is the wrong way round"
    )

    def __call__(self, pairs: Pairs) -> PreferenceValue:
        return dpo(pairs, self.beta, self.label_smoothing)


class IpoLoss(_PreferenceLoss):
    """Identity preference optimization: a margin that is reached, not pushed without end."""

    kind: Literal["ipo"] = "ipo"
    beta: float = _beta(0.1, "the margin of the mean log-ratios aimed at is 1 / (2 beta)")

    def __call__(self, pairs: Pairs) -> PreferenceValue:
        return ipo(pairs, self.beta)


class SimpoLoss(_PreferenceLoss):
    """Simple preference optimization: mean log-probabilities and no reference."""

    has_reference: ClassVar[bool] = False
    kind: Literal["simpo"] = "simpo"
    beta: float = _beta(2.0, "factor of the difference of the mean log-probabilities")
    margin: float = Field(default=1.0, ge=0, description="margin aimed at, after the factor beta")

    def __call__(self, pairs: Pairs) -> PreferenceValue:
        return simpo(pairs, self.beta, self.margin)


class OrpoLoss(_PreferenceLoss):
    """Odds ratio preference optimization: imitation of the better answer and preference in one loss."""

    has_reference: ClassVar[bool] = False
    kind: Literal["orpo"] = "orpo"
    weight: float = _beta(0.1, "weight of the preference beside the imitation; lambda in the paper")

    def __call__(self, pairs: Pairs) -> PreferenceValue:
        return orpo(pairs, self.weight)


AnyPreferenceLoss = Annotated[DpoLoss | IpoLoss | SimpoLoss | OrpoLoss, Field(discriminator="kind")]
