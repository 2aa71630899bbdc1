"""Values of tokens learned from stored episodes, and the policy that they make: implicit Q-learning for language.

ILQL (Snell et al. 2022) takes every sampled token for an action a in the state h, all that stands before it:

    Q(h, a)   what the rewards from here on are worth after the token       two heads, and a slow copy of each
    V(h)      what the state is worth under the better of the tokens that the data holds

Pure functions on torch tensors, [N] over sampled tokens, not reduced; targets and weights carry no gradient.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from learner.algorithm.episode import Episode
from rollout.wire.trajectory import Float32Array


def bellman_targets(episode: Episode, gamma: float) -> Float32Array:
    """r + gamma V(h') of every sampled token, h' the state before the next one: float32 [N].

    Snell et al. 2022, section 4, the target of L_Q. episode: with values of its states. A turn's reward is its last
    token's, and the discount falls there too, once a turn; between tokens of one turn it is 1. Behind the last token V
    counts where the episode was truncated, and is 0 where it ended.
    """
    assert episode.values is not None
    following_N = np.append(episode.values.before_N[1:], episode.bootstrap).astype(np.float64)
    ends = np.unique(np.cumsum(episode.tokens_K)) - 1  # a turn without a token has no state of its own
    discounts_N = np.ones(len(following_N))
    discounts_N[ends[ends >= 0]] = gamma
    return (episode.rewards_N + discounts_N * following_N).astype(np.float32)


def td_loss(q_N: Tensor, targets_N: Tensor) -> Tensor:
    """(r + gamma V(h') - Q(h, a))^2: L_Q of Snell et al. 2022, section 4."""
    return (targets_N - q_N).square()


def expectile_loss(difference_N: Tensor, expectile: float) -> Tensor:
    """|expectile - 1(u < 0)| u^2 with u = Q - V: L_V of Snell et al. 2022, section 4 (Kostrikov et al. 2021).

    Its minimum over V is an expectile of Q over the data's actions: their mean at 0.5, their maximum towards 1.
    """
    weight_N = torch.where(difference_N < 0, 1 - expectile, expectile)
    return weight_N * difference_N.square()


def conservative_loss(q_logprobs_N: Tensor) -> Tensor:
    """log sum_a' exp Q(h, a') - Q(h, a): L_CQL of Snell et al. 2022, section 4 (Kumar et al. 2020).

    q_logprobs_N: log-softmax of the action values over the vocabulary, at the sampled token.
    """
    return -q_logprobs_N


def advantage_weights(advantages_N: Tensor, temperature: float, limit: float) -> Tensor:
    """min(exp(A / temperature), limit), without gradient: Peng et al. 2019, Algorithm 1 and its weight clipping."""
    # Limited before exp: a weight that overflows float32 would be infinite.
    return (advantages_N.detach() / temperature).clamp(max=float(np.log(limit))).exp()


def advantage_weighted_loss(logprobs_N: Tensor, weights_N: Tensor) -> Tensor:
    """-w log pi(a | h): advantage-weighted regression, Peng et al. 2019, Algorithm 1."""
    return -weights_N * logprobs_N
