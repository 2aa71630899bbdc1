"""From rewards to advantages: pure functions on numpy arrays, float64 inside, float32 out.

G: siblings of a group; K: turns of an episode; N: sampled tokens of an episode, in order; M: anything.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from learner.ranks import ALONE, Ranks
from rollout.wire.trajectory import Float32Array

Float64Array = NDArray[np.float64]


def group_normalized(
    rewards_G: ArrayLike, eps: float = 1e-6, judged_G: ArrayLike | None = None
) -> Float32Array:
    """Group-relative advantages (r - mean) / (std + eps), Shao et al. 2024 (DeepSeekMath), section 4.1.

    The paper leaves open which standard deviation it takes; this is the population one (divided by G, not by
    G - 1). A group whose rewards are all equal says nothing about its episodes and gets exact zeros.

    rewards_G: [G] reward of each sibling, at least two; judged_G: of these it is asked whether all are equal (None: of
    the rewards), since a small cost beside equal rewards would be divided by its own deviation. Returns float32 [G].
    ValueError for a smaller group or a reward that is not finite; so do the other group baselines.
    """
    exact_G = _group(rewards_G)
    return _divided(exact_G - exact_G.mean(), exact_G.std(), eps, _judged(exact_G, judged_G))


def group_centered(rewards_G: ArrayLike) -> Float32Array:
    """r - mean: without the division, which favours groups of little variance. Liu et al. 2025 (Dr. GRPO), 3.2."""
    exact_G = _group(rewards_G)
    return _divided(exact_G - exact_G.mean(), 1.0, 0.0, exact_G)


def leave_one_out(rewards_G: ArrayLike) -> Float32Array:
    """r minus the mean of the others', an unbiased baseline. Ahmadian et al. 2024 (RLOO), equation 5."""
    exact_G = _group(rewards_G)
    others_G = (exact_G.sum() - exact_G) / (exact_G.size - 1)
    return _divided(exact_G - others_G, 1.0, 0.0, exact_G)


def mean_normalized(
    rewards_G: ArrayLike, eps: float = 1e-6, judged_G: ArrayLike | None = None
) -> Float32Array:
    """(r - mean) / (mean + eps): hard tasks weigh more. Tajwar et al. 2026 (MaxRL, arXiv 2602.02710), section 4.

    Made for rewards that are never negative; a group whose mean is not positive gets zeros. judged_G: as in
    `group_normalized`.
    """
    exact_G = _group(rewards_G)
    if exact_G.mean() <= 0:
        return np.zeros(exact_G.size, np.float32)
    return _divided(exact_G - exact_G.mean(), exact_G.mean(), eps, _judged(exact_G, judged_G))


def decoupled(rewards_GR: ArrayLike, weights_R: ArrayLike, eps: float = 1e-6) -> Float32Array:
    """Every named reward normalized in its group by itself, then their weighted sum: float32 [G].

    Liu et al. 2026 (GDPO, arXiv 2601.05242), equations 4 and 5; the batch's normalization that follows there is
    `globally_normalized`. rewards_GR: [G, R], weights_R: [R].
    """
    columns = np.asarray(rewards_GR, np.float64).T
    weights = np.asarray(weights_R, np.float64)
    parts = [weight * group_normalized(column, eps) for weight, column in zip(weights, columns, strict=True)]
    return np.sum(parts, axis=0).astype(np.float32)


def globally_normalized(
    values: Sequence[Float32Array], eps: float = 1e-8, ranks: Ranks = ALONE
) -> list[Float32Array]:
    """(x - mean) / (std + eps) over all entries of all arrays of all ranks: the batch's own baseline.

    Equal entries: zeros. Hu et al. 2025 (REINFORCE++, arXiv 2501.03262), section 3.2.
    """
    own_M = np.concatenate([np.zeros(0), *(np.asarray(array, np.float64) for array in values)])
    mean, std, lowest, highest = _moments(own_M, ranks)
    normal_M = np.zeros(own_M.size) if lowest == highest else (own_M - mean) / (std + eps)
    borders = np.cumsum([len(array) for array in values])[:-1]
    return [part.astype(np.float32) for part in np.split(normal_M, borders)] if values else []


def returns(rewards: ArrayLike, gamma: float = 1.0, bootstrap: float = 0.0) -> Float32Array:
    """Discounted sum of what follows each place, itself included: R_k = r_k + gamma R_(k+1), float32 [K].

    bootstrap: value of the state after the last place, 0 where the episode ended there.
    """
    exact_K = np.asarray(rewards, np.float64)
    out_K, following = np.empty_like(exact_K), bootstrap
    for place in range(len(exact_K) - 1, -1, -1):
        out_K[place] = following = exact_K[place] + gamma * following
    return out_K.astype(np.float32)


def gae(
    rewards_N: ArrayLike, values_N: ArrayLike, bootstrap: float, gamma: float, lam: float
) -> tuple[Float32Array, Float32Array]:
    """Generalized advantage estimation and the critic's targets, float32 [N] each. Schulman et al. 2016, eq. 16.

    delta_n = r_n + gamma V_(n+1) - V_n and A_n = delta_n + gamma lam A_(n+1), over SAMPLED tokens only: what an
    observation adds between two turns is no step of the policy's. bootstrap: V after the last token, 0 where the
    episode ended. The targets are A + V.
    """
    exact_N, value_N = np.asarray(rewards_N, np.float64), np.asarray(values_N, np.float64)
    out_N, following, value_after = np.empty_like(exact_N), 0.0, bootstrap
    for place in range(len(exact_N) - 1, -1, -1):
        delta = exact_N[place] + gamma * value_after - value_N[place]
        out_N[place] = following = delta + gamma * lam * following
        value_after = value_N[place]
    return out_N.astype(np.float32), (out_N + value_N).astype(np.float32)


def anchored(
    values: Sequence[ArrayLike],
    anchors: Sequence[Sequence[Hashable]],
    divide: bool,
    eps: float = 1e-6,
    judged: Sequence[ArrayLike] | None = None,
) -> list[Float32Array]:
    """Every turn against all turns of its group that began in the same state: one float32 [K] for each episode.

    Feng et al. 2025 (GiGPO, arXiv 2505.10978), section 3.3: A = (R - mean) / (std + eps) among the discounted returns
    of one anchor state. divide=False leaves the division away. A state met once has no one to compare with: zero.

    values: [K] of each sibling, its discounted returns; anchors: the state each of those turns began in; judged: as in
    `group_normalized`.
    """
    met: dict[Hashable, list[tuple[int, int]]] = defaultdict(list)
    for episode, states in enumerate(anchors):
        for turn, state in enumerate(states):
            met[state].append((episode, turn))
    exact = [np.asarray(array, np.float64) for array in values]
    out = [np.zeros(len(array), np.float32) for array in exact]
    for places in met.values():
        if len(places) < 2:
            continue
        here = np.array([exact[episode][turn] for episode, turn in places])
        asked = None if judged is None else [np.asarray(judged[episode])[turn] for episode, turn in places]
        scale, added = (here.std(), eps) if divide else (1.0, 0.0)
        scaled = _divided(here - here.mean(), scale, added, _judged(here, asked))
        for (episode, turn), value in zip(places, scaled, strict=True):
            out[episode][turn] = value
    return out


def overlong_penalty(length: int, limit: int, margin: int) -> float:
    """Soft punishment of length, 0 down to -1 within the last `margin` tokens. Yu et al. 2025 (DAPO), equation 13."""
    return -min(1.0, max(0.0, (length - (limit - margin)) / margin))


def _moments(own_M: Float64Array, ranks: Ranks) -> tuple[float, float, float, float]:
    """Mean, standard deviation, least and greatest of what all ranks hold together; zeros of nothing."""
    if ranks.size == 1 and own_M.size:
        return float(own_M.mean()), float(own_M.std()), float(own_M.min()), float(own_M.max())
    own = [own_M.size, float(own_M.sum()), float(own_M.min()), float(own_M.max())] if own_M.size else []
    held = [said for said in ranks.gather(own) if said]
    if not held:
        return 0.0, 0.0, 0.0, 0.0
    counts, sums, lows, highs = zip(*held, strict=True)
    mean = sum(sums) / sum(counts)
    # Around the mean, not around zero, where the difference of two large numbers would be what is left.
    squares = ranks.sums({"squares": float(((own_M - mean) ** 2).sum())})["squares"]
    return mean, (squares / sum(counts)) ** 0.5, min(lows), max(highs)


def _group(rewards_G: ArrayLike) -> Float64Array:
    exact_G = np.asarray(rewards_G, dtype=np.float64)
    if exact_G.ndim != 1 or exact_G.size < 2:
        raise ValueError(
            f"a group baseline needs at least 2 rewards, got {exact_G.size}; raise the group size"
        )
    if not np.isfinite(exact_G).all():
        raise ValueError(f"rewards must be finite, got {exact_G.tolist()}; check the environment's rewards")
    return exact_G


def _judged(exact_G: Float64Array, judged_G: ArrayLike | None) -> Float64Array:
    return exact_G if judged_G is None else np.asarray(judged_G, np.float64)


def _divided(centered: Float64Array, scale: float, eps: float, judged: Float64Array) -> Float32Array:
    """Exact zeros where all were equal: their centre may be a rounding away from them."""
    if judged.min() == judged.max():
        return np.zeros(judged.size, np.float32)
    return (centered / (scale + eps)).astype(np.float32)
