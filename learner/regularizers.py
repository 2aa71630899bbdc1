"""Divergence from a reference policy, estimated on sampled tokens. Pure functions, [N] over sampled tokens, nats.

Schulman 2020, "Approximating KL Divergence": with r = pi_reference / pi on tokens that pi sampled, k1 = -log r and
k3 = (r - 1) - log r have KL(pi || reference) as their mean, k2 = (log r)^2 / 2 is close to it; k2 and k3 are never
negative.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import BaseModel, Field, model_validator
from torch import Tensor

from learner.losses import LOG_LARGEST

Estimator = Literal["k1", "k2", "k3"]


def divergence(logprobs_N: Tensor, reference_N: Tensor, estimator: Estimator) -> Tensor:
    """Per-token estimate of KL(pi || reference); its gradient is that of the formula, as in a loss.

    log r is held within LOG_LARGEST, 20 nats, and has no gradient beyond: an engine may say -9999 of a token that it
    gave no chance, and k3 of one such token would be infinite.
    """
    log_ratio_N = (reference_N - logprobs_N).clamp(-LOG_LARGEST, LOG_LARGEST)
    if estimator == "k1":
        return -log_ratio_N
    if estimator == "k2":
        return log_ratio_N.square() / 2
    return torch.expm1(log_ratio_N) - log_ratio_N


class KlSettings(BaseModel, extra="forbid", frozen=True):
    """How far the policy may go from the one that reinforcement learning began with (version 0)."""

    coefficient: float = Field(gt=0, description="weight of the divergence")
    estimator: Estimator = Field(default="k3", description="Schulman's k1, k2 or k3")
    where: Literal["loss", "reward"] = Field(
        default="loss",
        description="added to every token's loss, or taken from every token's reward before advantages",
    )

    @model_validator(mode="after")
    def _pulls_back(self) -> KlSettings:
        if self.estimator == "k1" and self.where == "loss":
            raise ValueError(
                "kl.estimator='k1' in the loss holds nothing back: its gradient is that of log pi, which averages to "
                "zero over what pi samples; use 'k2' or 'k3', or where='reward'"
            )
        return self


class OverlongSettings(BaseModel, extra="forbid", frozen=True):
    """DAPO's soft punishment of episodes that come near a length."""

    tokens: int = Field(gt=0, description="sampled tokens of an episode at which the whole weight is taken")
    margin: int = Field(gt=0, description="tokens before that where it begins")
    weight: float = Field(default=1.0, gt=0, description="reward taken at most")

    @model_validator(mode="after")
    def _begins_above_zero(self) -> OverlongSettings:
        if self.margin > self.tokens:
            raise ValueError(
                f"overlong.margin={self.margin} begins below zero tokens: let it be at most tokens={self.tokens}"
            )
        return self
