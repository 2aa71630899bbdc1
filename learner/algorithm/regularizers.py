"""Divergence from a reference policy, estimated on sampled tokens. Pure functions, [N] over sampled tokens, nats.

Schulman 2020, "Approximating KL Divergence": with r = pi_reference / pi on tokens that pi sampled, k1 = -log r and
k3 = (r - 1) - log r have KL(pi || reference) as their mean, k2 = (log r)^2 / 2 is close to it; k2 and k3 are never
negative.

A mean and its gradient are two things. In a loss, the mean gradient of k2 is that of KL(pi || reference), that of k3 is
the gradient of KL(reference || pi), that of k1 is zero. "k3+" has the value of k3 and the gradient of k2. All of that
holds for tokens that pi itself sampled; nothing weighs back what an older policy sampled.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import BaseModel, Field, model_validator
from torch import Tensor

from learner.algorithm.losses import LOG_LARGEST

Estimator = Literal["k1", "k2", "k3", "k3+"]
CAP = 10.0  # nats of k3, as is usual; it is there at log r = 2.6 and at -11


def divergence(
    logprobs_N: Tensor, reference_N: Tensor, estimator: Estimator, cap: float | None = CAP
) -> Tensor:
    """Per-token estimate of KL(pi || reference); its gradient is that of the formula, as in a loss.

    log r is held within LOG_LARGEST, 20 nats, and has no gradient beyond: an engine may say -9999 of a token that it
    gave no chance, and k3 of one such token would be infinite. cap: k3 of one token is held there, and has no gradient
    beyond: at log r = 14 its slope is a million, and one token would be the whole batch. None: no cap.
    """
    log_ratio_N = (reference_N - logprobs_N).clamp(-LOG_LARGEST, LOG_LARGEST)
    if estimator == "k1":
        return -log_ratio_N
    if estimator == "k2":
        return log_ratio_N.square() / 2
    k3_N = (torch.expm1(log_ratio_N) - log_ratio_N).clamp(max=torch.inf if cap is None else cap)
    if estimator == "k3":
        return k3_N
    k2_N = log_ratio_N.square() / 2
    return k3_N.detach() + k2_N - k2_N.detach()


class KlSettings(BaseModel, extra="forbid", frozen=True):
    """How far the policy may go from the one that reinforcement learning began with (version 0)."""

    coefficient: float = Field(gt=0, description="coefficient of the divergence")
    estimator: Estimator = Field(
        default="k3",
        description="estimator of the divergence: Schulman's k1, k2 or k3, or k3+, the value of k3 with the "
        "gradient of k2. In the loss, k2 and k3+ have the gradient of KL(policy, reference), k3 "
        "that of KL(reference, policy)",
    )
    cap: float | None = Field(
        default=CAP,
        gt=0,
        description="upper bound of k3 for one token, nats; a token beyond it has no gradient. Not set: no "
        "bound",
    )
    where: Literal["loss", "reward"] = Field(
        default="loss",
        description="where the divergence enters. loss: added to the loss of every token. reward: subtracted "
        "from the reward of every token, before advantages",
    )

    @model_validator(mode="after")
    def _pulls_back(self) -> KlSettings:
        if self.estimator == "k1" and self.where == "loss":
            raise ValueError(
                "kl.estimator='k1' in the loss holds nothing back: its gradient is that of log pi, which averages to "
                "zero over what pi samples; use 'k2', 'k3' or 'k3+', or where='reward'"
            )
        if self.estimator == "k3+" and self.where == "reward":
            raise ValueError(
                "kl.estimator='k3+' differs from 'k3' by its gradient, and a reward has none; use 'k3'"
            )
        if self.estimator in ("k1", "k2") and self.cap != CAP:
            raise ValueError(
                f"kl.cap={self.cap} bounds k3, and kl.estimator={self.estimator!r}; leave it away"
            )
        return self


class OverlongSettings(BaseModel, extra="forbid", frozen=True):
    """DAPO's soft punishment of episodes that come near a length."""

    tokens: int = Field(gt=0, description="sampled tokens of an episode from which the whole penalty applies")
    margin: int = Field(
        gt=0,
        description="length of the ramp before that, tokens: the penalty rises linearly from tokens - margin "
        "on",
    )
    weight: float = Field(
        default=1.0, gt=0, description="largest penalty, subtracted from the episode's reward"
    )

    @model_validator(mode="after")
    def _begins_above_zero(self) -> OverlongSettings:
        if self.margin > self.tokens:
            raise ValueError(
                f"overlong.margin={self.margin} begins below zero tokens: let it be at most tokens={self.tokens}"
            )
        return self
