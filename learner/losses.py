"""Per-token losses and what is logged beside them: pure functions on torch tensors.

All inputs are [T] over sampled tokens, logprobs in nats. Losses come back per token and unreduced: the caller
divides their sum by the token count of the WHOLE batch, so that any split into micro-batches has the same
gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor


def policy_loss(
    logprobs_T: Tensor,
    proximal_logprobs_T: Tensor,
    behavior_logprobs_T: Tensor,
    advantages_T: Tensor,
    clip_low: float,
    clip_high: float,
    tis_cap: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's clipped surrogate with asymmetric clips, weighted by a truncated importance weight.

    loss = -w * min(r * A, clip(r, 1 - clip_low, 1 + clip_high) * A), where r = pi / pi_proximal carries the
    gradient (Schulman et al. 2017; separate clips: Yu et al. 2025, DAPO) and w = min(pi_proximal /
    pi_behavior, tis_cap) does not (Espeholt et al. 2018, IMPALA; a proximal policy apart from the behavior
    one: Hilton et al. 2022).

    Returns the loss [T] and float indicators [T]: "clipped" where the clip stopped the gradient, "tis_capped"
    where the importance weight hit its cap.
    """
    ratio_T = torch.exp(logprobs_T - proximal_logprobs_T.detach())
    free_T = ratio_T * advantages_T
    bounded_T = ratio_T.clamp(1.0 - clip_low, 1.0 + clip_high) * advantages_T
    with torch.no_grad():
        importance_T = torch.exp(proximal_logprobs_T - behavior_logprobs_T)
        weight_T = importance_T.clamp(max=tis_cap)
        stats = {
            "clipped": (bounded_T < free_T).to(torch.float32),
            "tis_capped": (importance_T > tis_cap).to(torch.float32),
        }
    return -weight_T * torch.minimum(free_T, bounded_T), stats


def cross_entropy_loss(logprobs_T: Tensor) -> Tensor:
    """Negative log-likelihood of each token, [T]."""
    return -logprobs_T


def kl_k3(logprobs_T: Tensor, behavior_logprobs_T: Tensor) -> Tensor:
    """Per-token estimate [T] of KL(behavior || policy) on tokens the behavior policy sampled; never negative.

    The third estimator of Schulman 2020, "Approximating KL Divergence": (r - 1) - log r with r = pi /
    pi_behavior.
    """
    log_ratio_T = logprobs_T - behavior_logprobs_T
    return torch.expm1(log_ratio_T) - log_ratio_T
