"""Divergence from a reference policy, estimated on sampled tokens. Pure functions, [N] over sampled tokens, nats.

Schulman 2020, "Approximating KL Divergence": with r = pi_reference / pi on tokens that pi sampled, k1 = -log r and
k3 = (r - 1) - log r have KL(pi || reference) as their mean, k2 = (log r)^2 / 2 is close to it; k2 and k3 are never
negative.

An estimator's mean and the mean of its gradient differ. In a loss, the mean gradient of k2 is that of
KL(pi || reference), that of k3 is the gradient of KL(reference || pi), that of k1 is zero. "k3+" has the value of k3
and the gradient of k2. All of this holds for on-policy tokens; samples of an older policy are not reweighted.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import BaseModel, Field, model_validator
from torch import Tensor

from learner.algorithm.losses import LOG_LARGEST

Estimator = Literal["k1", "k2", "k3", "k3+"]
CAP = 10.0  # nats of k3, a usual value; reached at log r = 2.6 and at -11


def divergence(
    logprobs_N: Tensor, reference_N: Tensor, estimator: Estimator, cap: float | None = CAP
) -> Tensor:
    """Per-token estimate of KL(pi || reference); its gradient is that of the formula, as in a loss.

    log r is clamped to LOG_LARGEST, 20 nats, without a gradient beyond: an engine may report -9999 for a token of zero
    probability, whose k3 would be infinite. cap: upper bound of k3 of one token, without a gradient beyond: at
    log r = 14 its slope is a million, and one token would dominate the batch. None: no cap.
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
    """Penalty on the divergence of the policy from the reference policy (version 0)."""

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
                "kl.estimator='k1' has no effect in the loss: its gradient is that of log pi, whose mean over samples "
                "of pi is zero; use 'k2', 'k3' or 'k3+', or where='reward'"
            )
        if self.estimator == "k3+" and self.where == "reward":
            raise ValueError(
                "kl.estimator='k3+' differs from 'k3' only in its gradient, and a reward has none; use 'k3'"
            )
        if self.estimator in ("k1", "k2") and self.cap != CAP:
            raise ValueError(
                f"kl.cap={self.cap} bounds k3 alone, but kl.estimator={self.estimator!r}; remove kl.cap"
            )
        return self


class OverlongSettings(BaseModel, extra="forbid", frozen=True):
    """DAPO's soft penalty on episodes near a maximum length."""

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
                f"overlong.margin={self.margin} exceeds overlong.tokens={self.tokens}; lower margin to at most tokens"
            )
        return self
