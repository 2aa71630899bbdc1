"""Policy losses per token and their statistics: pure functions on torch tensors.

All inputs are [N] over sampled tokens, logprobs in nats; `proximal` is the denominator of the ratio and carries no
gradient. Losses are returned per token, not reduced (aggregation.py has the weights), so that any split into
micro-batches has the same gradient. A loss is a section of the recipe (`learner.algorithm.loss`, chosen by `kind`) that
calls its function with its options.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BaseModel, Field, model_validator
from torch import Tensor

LOG_LARGEST = 20.0  # bound of a log ratio: exp(20) is half a billion

Loss = tuple[Tensor, dict[str, Tensor]]  # [N] with gradient; statistics without


def clipped(
    logprobs_N: Tensor,
    proximal_N: Tensor,
    advantages_N: Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> Loss:
    """PPO's clipped surrogate -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) with r = pi / pi_proximal.

    Schulman et al. 2017, equation 7; separate bounds: Yu et al. 2025 (DAPO), equation 8. dual_clip bounds the loss
    under a negative advantage at -dual_clip A: Ye et al. 2020 (arXiv 1912.09729), equation 5.

    Statistics: "clip_fraction", 1 where a clip stopped the gradient.
    """
    return _clipped(ratio(logprobs_N, proximal_N), advantages_N, clip_low, clip_high, dual_clip)


def policy_gradient(logprobs_N: Tensor, advantages_N: Tensor) -> Loss:
    """-A log pi, Williams 1992 (REINFORCE); off-policy samples need a correction beside it."""
    return -advantages_N * logprobs_N, {}


def sequence_clipped(
    logprobs_N: Tensor,
    proximal_N: Tensor,
    advantages_N: Tensor,
    sequence_N: Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> Loss:
    """GSPO: one ratio for a sequence, s = exp(mean of log r over its tokens), clipped as PPO's.

    Zheng et al. 2025 (arXiv 2507.18071), section 4.3 (GSPO-token): the value at every token is the sequence's ratio,
    the gradient is that of the token's own logprob, so that advantages may differ from turn to turn. With equal
    advantages it is equation 5. sequence_N: int64, the sequence of each token. dual_clip: as in `clipped`.
    """
    mean_N = sequence_mean(logprobs_N - proximal_N, sequence_N).detach()
    own_N = logprobs_N - logprobs_N.detach()  # zero, with a gradient
    ratio_N = ratio(mean_N + own_N, torch.zeros_like(mean_N))
    return _clipped(ratio_N, advantages_N, clip_low, clip_high, dual_clip)


def cispo(
    logprobs_N: Tensor, proximal_N: Tensor, advantages_N: Tensor, clip_low: float, clip_high: float
) -> Loss:
    """CISPO: -sg(clip(r, 1 - clip_low, 1 + clip_high)) A log pi; the weight is clipped, every token has a gradient.

    Chen et al. 2025 (MiniMax-M1, arXiv 2506.13585), equations 4 and 5. Statistics: "clip_fraction", 1 where the weight
    was clipped.
    """
    with torch.no_grad():
        ratio_N = ratio(logprobs_N, proximal_N)
        weight_N = ratio_N.clamp(1.0 - clip_low, 1.0 + clip_high)
        stats = {"clip_fraction": (weight_N != ratio_N).float()}
    return -weight_N * advantages_N * logprobs_N, stats


def soft_gated(
    logprobs_N: Tensor, proximal_N: Tensor, advantages_N: Tensor, positive: float, negative: float
) -> Loss:
    """SAPO: -A (4 / tau) sigmoid(tau (r - 1)); the gradient decays with the distance instead of a cut.

    tau is `positive` for positive advantages and `negative` for the others. Gao et al. 2025 (arXiv 2511.20347),
    equations 5 and 6.
    """
    ratio_N = ratio(logprobs_N, proximal_N)
    tau_N = torch.where(advantages_N > 0, positive, negative)
    return -advantages_N * (4.0 / tau_N) * torch.sigmoid(tau_N * (ratio_N - 1.0)), {}


def divergence_masked(
    logprobs_N: Tensor,
    proximal_N: Tensor,
    advantages_N: Tensor,
    divergence: str,
    threshold: float,
    ratio_cap: float | None = None,
) -> Loss:
    """DPPO: -r A, without a gradient where the token's distribution is outside the trust region and A moves it away.

    Both distributions are taken as binary, "this token or another", with p and q the token's probabilities: the total
    variation is |p - q|, the divergence ("kl") q log(q / p) + (1 - q) log((1 - q) / (1 - p)). A token is masked where
    that exceeds the threshold and A pushes r further from 1. Qi et al. 2026 (arXiv 2602.04879), section 4.

    A token that was rare when sampled may have a large r, which is then its weight on the way back. ratio_cap: upper
    bound of r in loss and slope; such a token keeps a gradient (truncated importance sampling).

    Statistics: "clip_fraction", 1 for masked tokens.
    """
    ratio_N = ratio(logprobs_N, proximal_N)
    weight_N = ratio_N
    if ratio_cap is not None:
        slope_N = 1 + logprobs_N - logprobs_N.detach()  # one, with the gradient of the logprob
        weight_N = ratio_N.detach().clamp(max=ratio_cap) * slope_N
    with torch.no_grad():
        p_N, q_N = logprobs_N.exp(), proximal_N.exp()
        if divergence == "tv":
            apart_N = (p_N - q_N).abs()
        else:
            tiny = torch.finfo(p_N.dtype).tiny
            others_N = torch.special.xlogy(1 - q_N, (1 - q_N).clamp_min(tiny) / (1 - p_N).clamp_min(tiny))
            apart_N = q_N * (proximal_N - logprobs_N) + others_N
        further_N = torch.where(advantages_N > 0, ratio_N > 1, (advantages_N < 0) & (ratio_N < 1))
        masked_N = (apart_N > threshold) & further_N
        stats = {"clip_fraction": masked_N.float()}
    return torch.where(masked_N, 0.0, -weight_N * advantages_N), stats


def ratio(logprobs_N: Tensor, proximal_N: Tensor) -> Tensor:
    """pi / pi_proximal, bounded at exp(LOG_LARGEST); beyond the bound it is constant with zero gradient."""
    return (logprobs_N - proximal_N).clamp(-LOG_LARGEST, LOG_LARGEST).exp()


def cross_entropy(logprobs_N: Tensor) -> Tensor:
    """Negative log-likelihood of each token, [N]."""
    return -logprobs_N


def sequence_mean(values_N: Tensor, sequence_N: Tensor) -> Tensor:
    """Mean over each token's sequence, repeated at its tokens: float [N]."""
    return sequence_sum(values_N, sequence_N) / sequence_sum(torch.ones_like(values_N), sequence_N)


def sequence_sum(values_N: Tensor, sequence_N: Tensor) -> Tensor:
    """Sum over each token's sequence, repeated at its tokens: float [N]."""
    count = int(sequence_N.max()) + 1 if len(sequence_N) else 0
    return values_N.new_zeros(count).index_add(0, sequence_N, values_N)[sequence_N]


def _clipped(ratio_N: Tensor, advantages_N: Tensor, low: float, high: float, dual_clip: float | None) -> Loss:
    free_N = ratio_N * advantages_N
    bounded_N = ratio_N.clamp(1.0 - low, 1.0 + high) * advantages_N
    surrogate_N = torch.minimum(free_N, bounded_N)
    stopped_N = bounded_N < free_N
    if dual_clip is not None:
        floor_N = torch.where(advantages_N < 0, dual_clip * advantages_N, -torch.inf)
        stopped_N = stopped_N | (floor_N > surrogate_N)
        surrogate_N = torch.maximum(surrogate_N, floor_N)
    return -surrogate_N, {"clip_fraction": stopped_N.detach().float()}


class _PolicyLoss(BaseModel, extra="forbid", frozen=True):
    has_ratio: ClassVar[bool] = True  # uses the ratio pi / pi_proximal
    clips: ClassVar[bool] = True  # clips at a distance and reports clip_fraction


def _dual_clip() -> Any:
    return Field(
        default=None,
        gt=1,
        description="upper bound of the ratio for negative advantages (dual-clip PPO; 3 in the paper); a "
        "token beyond it has no gradient. Not set: no bound",
    )


class ClippedLoss(_PolicyLoss):
    """PPO's and GRPO's clipped surrogate."""

    kind: Literal["ppo"] = "ppo"
    clip_low: float = Field(
        default=0.2, gt=0, lt=1, description="lower clip: the ratio is clipped below at 1 - clip_low"
    )
    clip_high: float = Field(
        default=0.28,
        gt=0,
        description="upper clip: the ratio is clipped above at 1 + clip_high; larger than clip_low is DAPO's "
        "clip-higher",
    )
    dual_clip: float | None = _dual_clip()

    def __call__(self, logprobs_N: Tensor, proximal_N: Tensor, advantages_N: Tensor, _: Tensor) -> Loss:
        return clipped(logprobs_N, proximal_N, advantages_N, self.clip_low, self.clip_high, self.dual_clip)


class PolicyGradientLoss(_PolicyLoss):
    """The plain policy gradient."""

    has_ratio: ClassVar[bool] = False
    clips: ClassVar[bool] = False
    kind: Literal["reinforce"] = "reinforce"

    def __call__(self, logprobs_N: Tensor, proximal_N: Tensor, advantages_N: Tensor, _: Tensor) -> Loss:
        return policy_gradient(logprobs_N, advantages_N)


class SequenceClippedLoss(_PolicyLoss):
    """GSPO: the clipped surrogate with one ratio a sequence."""

    kind: Literal["gspo"] = "gspo"
    clip_low: float = Field(
        default=3e-4, gt=0, lt=1, description="lower clip of the sequence's ratio, at 1 - clip_low"
    )
    clip_high: float = Field(
        default=4e-4, gt=0, description="upper clip of the sequence's ratio, at 1 + clip_high"
    )
    dual_clip: float | None = _dual_clip()

    def __call__(
        self, logprobs_N: Tensor, proximal_N: Tensor, advantages_N: Tensor, sequence_N: Tensor
    ) -> Loss:
        return sequence_clipped(
            logprobs_N, proximal_N, advantages_N, sequence_N, self.clip_low, self.clip_high, self.dual_clip
        )


class CispoLoss(_PolicyLoss):
    """CISPO: a policy gradient with clipped importance weights."""

    kind: Literal["cispo"] = "cispo"
    clip_low: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="lower clip of the importance weight, at 1 - clip_low; 1: no lower clip",
    )
    clip_high: float = Field(
        default=0.28, gt=0, description="upper clip of the importance weight, at 1 + clip_high"
    )

    def __call__(self, logprobs_N: Tensor, proximal_N: Tensor, advantages_N: Tensor, _: Tensor) -> Loss:
        return cispo(logprobs_N, proximal_N, advantages_N, self.clip_low, self.clip_high)


class SoftGatedLoss(_PolicyLoss):
    """SAPO: a soft gate in place of the clip."""

    clips: ClassVar[bool] = False
    kind: Literal["sapo"] = "sapo"
    positive: float = Field(
        default=1.0,
        gt=0,
        description="temperature of the gate for positive advantages; larger values narrow the gate",
    )
    negative: float = Field(
        default=1.05,
        gt=0,
        description="temperature of the gate for negative advantages; slightly larger, as their gradients are "
        "less stable",
    )

    def __call__(self, logprobs_N: Tensor, proximal_N: Tensor, advantages_N: Tensor, _: Tensor) -> Loss:
        return soft_gated(logprobs_N, proximal_N, advantages_N, self.positive, self.negative)


class DivergenceLoss(_PolicyLoss):
    """DPPO: a trust region on probabilities in place of clipped ratios."""

    kind: Literal["dppo"] = "dppo"
    divergence: Literal["tv", "kl"] = Field(
        default="tv",
        description="measure of the distance between a token's probabilities: tv, total variation; kl, "
        "Kullback-Leibler divergence",
    )
    threshold: float = Field(
        default=0.15,
        gt=0,
        description="distance beyond which a token has no gradient, if the update would increase it. With "
        "divergence='kl' the default is 0.05",
    )
    ratio_cap: float | None = Field(
        default=None,
        gt=1,
        description="upper bound of a token's importance ratio, such as 20; rare tokens can have ratios of "
        "thousands. Not set: no bound",
    )

    @model_validator(mode="before")
    @classmethod
    def _threshold_of_the_divergence(cls, section: Any) -> Any:
        if isinstance(section, dict) and section.get("divergence") == "kl":
            return {"threshold": 0.05} | section
        return section

    def __call__(self, logprobs_N: Tensor, proximal_N: Tensor, advantages_N: Tensor, _: Tensor) -> Loss:
        return divergence_masked(
            logprobs_N, proximal_N, advantages_N, self.divergence, self.threshold, self.ratio_cap
        )


AnyLoss = Annotated[
    ClippedLoss | PolicyGradientLoss | SequenceClippedLoss | CispoLoss | SoftGatedLoss | DivergenceLoss,
    Field(discriminator="kind"),
]
