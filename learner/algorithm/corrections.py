"""Off-policy corrections: factors on the loss of tokens that another policy sampled.

Importance ratios are pi_proximal / pi_behavior: the learner's own logprobs before its first update on the batch against
those recorded while sampling. They carry no gradient. A mask sets a token's loss to zero and leaves the denominators
unchanged, so that masked tokens do not make the others heavier. Several corrections multiply. Each is a section of the
list `learner.algorithm.corrections`, chosen by `kind`.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from learner.algorithm.losses import LOG_LARGEST, sequence_mean, sequence_sum


def ratios(log_ratio_N: Tensor) -> Tensor:
    """exp, kept finite: float [N]."""
    return log_ratio_N.clamp(-LOG_LARGEST, LOG_LARGEST).exp()


def truncated(log_ratio_N: Tensor, cap: float) -> Tensor:
    """min(w, cap) for each token. Espeholt et al. 2018 (IMPALA, arXiv 1802.01561), section 4.1: its rho."""
    return ratios(log_ratio_N).clamp(max=cap)


def sequence_truncated(log_ratio_N: Tensor, sequence_N: Tensor, cap: float) -> Tensor:
    """min(product of w over the sequence, cap) at each of its tokens; unbiased except for the cap."""
    return ratios(sequence_sum(log_ratio_N, sequence_N)).clamp(max=cap)


def within(log_ratio_N: Tensor, low: float, high: float) -> Tensor:
    """bool [N]: the token's own ratio lies in [low, high]."""
    ratio_N = ratios(log_ratio_N)
    return (ratio_N >= low) & (ratio_N <= high)


def geometric_within(log_ratio_N: Tensor, sequence_N: Tensor, low: float, high: float) -> Tensor:
    """bool [N]: the geometric mean of the sequence's ratios lies in [low, high]; independent of its length."""
    ratio_N = ratios(sequence_mean(log_ratio_N, sequence_N))
    return (ratio_N >= low) & (ratio_N <= high)


def effective_sample_share(total: float, squares: float, count: float) -> float:
    """Effective sample size as a share of the tokens: (sum w)^2 / (N sum w^2), between 1 / N and 1. Kish 1965."""
    return total / count * (total / squares)


class _Correction(BaseModel, extra="forbid", frozen=True):
    needs_ratio: ClassVar[bool] = True  # 1 everywhere if the behavior policy is the proximal one
    masks: ClassVar[bool] = True  # weights may be 0


class TruncatedImportance(_Correction):
    """Truncated importance sampling, per token or per sequence."""

    masks: ClassVar[bool] = False
    kind: Literal["tis"] = "tis"
    of: Literal["token", "sequence"] = Field(
        default="token",
        description="which importance ratio is the weight. token: the token's own. sequence: the product of "
        "the ratios of its sequence",
    )
    cap: float = Field(default=2.0, gt=0, description="upper bound of the weight")

    def __call__(self, log_ratio_N: Tensor, sequence_N: Tensor, lag_N: Tensor) -> Tensor:
        if self.of == "token":
            return truncated(log_ratio_N, self.cap)
        return sequence_truncated(log_ratio_N, sequence_N, self.cap)


class ImportanceMask(_Correction):
    """Rejection of tokens, or of sequences by their geometric mean, whose ratio is out of bounds.

    Li et al. 2025, "When Speed Kills Stability", part 3, reject sequences by the geometric mean.
    """

    kind: Literal["mask"] = "mask"
    of: Literal["token", "sequence"] = Field(
        default="token",
        description="which importance ratio is compared. token: the token's own. sequence: the geometric mean "
        "of the ratios of its sequence",
    )
    low: float = Field(default=0.5, ge=0, lt=1, description="smallest ratio that is not masked")
    high: float = Field(default=2.0, gt=1, description="largest ratio that is not masked")

    def __call__(self, log_ratio_N: Tensor, sequence_N: Tensor, lag_N: Tensor) -> Tensor:
        if self.of == "token":
            inside_N = within(log_ratio_N, self.low, self.high)
        else:
            inside_N = geometric_within(log_ratio_N, sequence_N, self.low, self.high)
        return inside_N.to(log_ratio_N.dtype)


class IcePop(_Correction):
    """The ratio itself within bounds, 0 outside. Ling team 2025 (Ring-1T, arXiv 2510.18855), section 3.1."""

    kind: Literal["icepop"] = "icepop"
    low: float = Field(default=0.5, ge=0, lt=1, description="smallest ratio that is not masked")
    high: float = Field(default=5.0, gt=1, description="largest ratio that is not masked")

    def __call__(self, log_ratio_N: Tensor, sequence_N: Tensor, lag_N: Tensor) -> Tensor:
        return torch.where(within(log_ratio_N, self.low, self.high), ratios(log_ratio_N), 0.0)


class LagMask(_Correction):
    """Mask of tokens sampled by weights that are too old; other tokens of their episode stay."""

    needs_ratio: ClassVar[bool] = False
    kind: Literal["lag"] = "lag"
    max_lag: int = Field(ge=0, description="largest lag of a token that is not masked, weight versions")

    def __call__(self, log_ratio_N: Tensor, sequence_N: Tensor, lag_N: Tensor) -> Tensor:
        return (lag_N <= self.max_lag).to(log_ratio_N.dtype)


AnyCorrection = Annotated[
    TruncatedImportance | ImportanceMask | IcePop | LagMask, Field(discriminator="kind")
]
