"""Formulas from rewards to advantages: pure functions on numpy arrays, float64 inside, float32 out.

G: siblings of a group; K: turns of an episode; N: sampled tokens of an episode, in order; M: anything.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from learner.parallel.ranks import ALONE, Ranks
from rollout.wire.equality import all_equal, bounds
from rollout.wire.trajectory import Float32Array

Float64Array = NDArray[np.float64]
Deviation = Literal["population", "sample"]


def group_normalized(
    rewards_G: ArrayLike,
    eps: float = 1e-6,
    equal: bool | None = None,
    deviation: Deviation = "population",
) -> Float32Array:
    """Group-relative advantages (r - mean) / (std + eps), Shao et al. 2024 (DeepSeekMath), section 4.1.

    The paper does not say which standard deviation it uses: "population" divides the squares by G, "sample" by G - 1.
    A group of equal rewards has no learning signal and gets exact zeros.

    rewards_G: [G] reward of each sibling, at least two; equal: whether the task's rewards are all equal (None: computed
    from rewards_G), since a small cost beside equal rewards would be divided by its own deviation. Returns float32 [G].
    All group baselines raise ValueError for a smaller group and for a reward that is not finite.
    """
    exact_G = _group(rewards_G)
    return _divided(exact_G - exact_G.mean(), _std(exact_G, deviation) + eps, _equal(exact_G, equal))


def group_centered(rewards_G: ArrayLike, equal: bool | None = None) -> Float32Array:
    """r - mean, without the division that favours groups of little variance. Liu et al. 2025 (Dr. GRPO), 3.2."""
    exact_G = _group(rewards_G)
    return _divided(exact_G - exact_G.mean(), 1.0, _equal(exact_G, equal))


def leave_one_out(rewards_G: ArrayLike, equal: bool | None = None) -> Float32Array:
    """r minus the mean of the others', an unbiased baseline. Ahmadian et al. 2024 (RLOO), equation 5."""
    exact_G = _group(rewards_G)
    others_G = (exact_G.sum() - exact_G) / (exact_G.size - 1)
    return _divided(exact_G - others_G, 1.0, _equal(exact_G, equal))


def mean_normalized(rewards_G: ArrayLike, eps: float = 1e-6, equal: bool | None = None) -> Float32Array:
    """(r - mean) / (mean + eps): hard tasks weigh more. Tajwar et al. 2026 (MaxRL, arXiv 2602.02710), section 4.

    For rewards that are never negative; a group whose mean is not positive, or only a rounding error, gets zeros.
    equal: as in `group_normalized`.
    """
    exact_G = _group(rewards_G)
    mean = float(exact_G.mean())
    if mean <= 0 or all_equal([mean, 0.0], [float(np.abs(exact_G).mean()), 0.0]):
        return np.zeros(exact_G.size, np.float32)
    return _divided(exact_G - mean, mean + eps, _equal(exact_G, equal))


def decoupled(
    rewards_GR: ArrayLike,
    weights_R: ArrayLike,
    eps: float = 1e-6,
    deviation: Deviation = "population",
    magnitudes_GR: ArrayLike | None = None,
) -> Float32Array:
    """Weighted sum of the named rewards, each normalized within the group: float32 [G].

    Liu et al. 2026 (GDPO, arXiv 2601.05242), equations 4 and 5; the batch normalization that follows there is
    `globally_normalized`. rewards_GR: [G, R]; weights_R: [R]; magnitudes_GR: of the rewards, see wire/equality.py.
    """
    columns = np.asarray(rewards_GR, np.float64).T
    sizes = np.abs(columns) if magnitudes_GR is None else np.asarray(magnitudes_GR, np.float64).T
    weights = np.asarray(weights_R, np.float64)
    parts = [
        weight * group_normalized(column, eps, all_equal(column, size), deviation)
        for weight, column, size in zip(weights, columns, sizes, strict=True)
    ]
    return np.sum(parts, axis=0).astype(np.float32)


def globally_normalized(
    values: Sequence[Float32Array],
    eps: float = 1e-8,
    ranks: Ranks = ALONE,
    magnitudes: Sequence[ArrayLike] | None = None,
) -> list[Float32Array]:
    """(x - mean) / sqrt(variance + eps) over all entries of all arrays on all ranks; zeros where all are equal.

    Hu et al. 2025 (REINFORCE++, arXiv 2501.03262), section 3.2. eps: added to the variance, which floors the deviation
    at 1e-4: a batch that differs by less (costs of 1e-9 beside equal rewards) keeps small advantages.
    magnitudes: of the values, entry by entry, see wire/equality.py; None: the values' own.
    """
    own_M = _flat(values)
    mean, variance, equal = _moments(own_M, own_M if magnitudes is None else _flat(magnitudes), ranks)
    normal_M = np.zeros(own_M.size) if equal else (own_M - mean) / np.sqrt(variance + eps)
    borders = np.cumsum([len(array) for array in values])[:-1]
    return [part.astype(np.float32) for part in np.split(normal_M, borders)] if values else []


def turn_normalized(
    values: Sequence[ArrayLike], eps: float = 1e-8, equal: bool = False
) -> list[Float32Array]:
    """Values minus the mean of the siblings' values at the same turn number: one float32 [K] for each episode.

    Late turns, whose returns are small in all episodes, are so not compared with early ones. All differences are
    divided by sqrt(variance + eps) of the whole group. A turn reached by one episode alone gets zero. equal: whether
    the task's rewards are all equal, as in `group_normalized`.
    """
    exact = [np.asarray(array, np.float64) for array in values]
    centered = [np.zeros(len(array)) for array in exact]
    for turn in range(max((len(array) for array in exact), default=0)):
        there = [place for place, array in enumerate(exact) if len(array) > turn]
        mean = np.mean([exact[place][turn] for place in there])
        for place in there if len(there) > 1 else ():
            centered[place][turn] = exact[place][turn] - mean
    scale = 0.0 if equal else 1.0 / np.sqrt(np.mean(_flat(centered) ** 2) + eps)
    return [(scale * array).astype(np.float32) for array in centered]


def returns(rewards: ArrayLike, gamma: float = 1.0, bootstrap: float = 0.0) -> Float32Array:
    """Discounted returns R_k = r_k + gamma R_(k+1), float32 [K].

    bootstrap: value of the state after the last entry, 0 where the episode ended there.
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

    delta_n = r_n + gamma V_(n+1) - V_n and A_n = delta_n + gamma lam A_(n+1), over SAMPLED tokens only: tokens of an
    observation between two turns are no steps of the policy. bootstrap: V after the last token, 0 where the episode
    ended. The targets are A + V.
    """
    exact_N, value_N = np.asarray(rewards_N, np.float64), np.asarray(values_N, np.float64)
    out_N, following, value_after = np.empty_like(exact_N), 0.0, bootstrap
    for place in range(len(exact_N) - 1, -1, -1):
        delta = exact_N[place] + gamma * value_after - value_N[place]
        out_N[place] = following = delta + gamma * lam * following
        value_after = value_N[place]
    return out_N.astype(np.float32), (out_N + value_N).astype(np.float32)


def turn_targets(
    rewards_J: ArrayLike, before_J: ArrayLike, behind_J: ArrayLike, gamma: float, lam: float
) -> tuple[Float32Array, Float32Array]:
    """Targets of the values before and behind each turn, V and Q: float32 [J] each.

        V(s_j) -> Q'(s_j, a_j)    Q(s_j, a_j) -> G_j = r_j + gamma ((1 - lam) V'(s_(j+1)) + lam G_(j+1))

    Zhou et al. 2024 (ArCHer, arXiv 2402.19446), equations 1 and 2, whose targets have lam = 0. before_J, behind_J: V'
    and Q' of the slow copy. Nothing follows the last turn, also of a truncated episode: the limit of turns belongs to
    the task.
    """
    exact_J, value_J = np.asarray(rewards_J, np.float64), np.asarray(before_J, np.float64)
    out_J, following, value_after = np.empty_like(exact_J), 0.0, 0.0
    for place in range(len(exact_J) - 1, -1, -1):
        following = exact_J[place] + gamma * ((1 - lam) * value_after + lam * following)
        out_J[place], value_after = following, value_J[place]
    return np.asarray(behind_J, np.float32), out_J.astype(np.float32)


def anchored(
    values: Sequence[ArrayLike],
    anchors: Sequence[Sequence[Hashable]],
    divide: bool,
    eps: float = 1e-6,
    judged: tuple[Sequence[ArrayLike], Sequence[ArrayLike]] | None = None,
    deviation: Deviation = "population",
) -> list[Float32Array]:
    """Returns of turns normalized over all turns of the group that began in the same state: float32 [K] per episode.

    Feng et al. 2025 (GiGPO, arXiv 2505.10978), section 3.3: A = (R - mean) / (std + eps) among the discounted returns
    of one anchor state. divide=False omits the division. A state that occurs once gets zero.

    values: [K] discounted returns of each sibling; anchors: the state in which each of these turns began; judged:
    returns and their magnitudes, [K] of each sibling, whose equality makes zeros (None: values themselves).
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
        here = _at(exact, places)
        equal = all_equal(here) if judged is None else all_equal(*(_at(part, places) for part in judged))
        scaled = _divided(here - here.mean(), _std(here, deviation) + eps if divide else 1.0, equal)
        for (episode, turn), value in zip(places, scaled, strict=True):
            out[episode][turn] = value
    return out


def overlong_penalty(length: int, limit: int, margin: int) -> float:
    """Soft length penalty, from 0 to -1 over the last `margin` tokens. Yu et al. 2025 (DAPO), equation 13."""
    return -min(1.0, max(0.0, (length - (limit - margin)) / margin))


def _moments(own_M: Float64Array, sizes_M: Float64Array, ranks: Ranks) -> tuple[float, float, bool]:
    """Mean and variance over the values of all ranks, and whether all values are equal; (0, 0, True) without any."""
    low_M, high_M = bounds(own_M, sizes_M)
    own = [own_M.size, float(own_M.sum()), float(low_M.max()), float(high_M.min())] if own_M.size else []
    held = [said for said in ranks.gather(own) if said]
    if not held:
        return 0.0, 0.0, True
    counts, sums, lows, highs = zip(*held, strict=True)
    mean = sum(sums) / sum(counts)
    # Squares around the mean: around zero the result would be the difference of two large numbers.
    squares = ranks.sums({"squares": float(((own_M - mean) ** 2).sum())})["squares"]
    return mean, squares / sum(counts), max(lows) <= min(highs)


def _group(rewards_G: ArrayLike) -> Float64Array:
    exact_G = np.asarray(rewards_G, dtype=np.float64)
    if exact_G.ndim != 1 or exact_G.size < 2:
        raise ValueError(
            f"a group baseline needs at least 2 rewards, got {exact_G.size}; raise the group size"
        )
    if not np.isfinite(exact_G).all():
        raise ValueError(f"rewards must be finite, got {exact_G.tolist()}; check the environment's rewards")
    return exact_G


def _equal(exact_G: Float64Array, equal: bool | None) -> bool:
    return all_equal(exact_G) if equal is None else equal


def _std(exact_M: Float64Array, deviation: Deviation) -> float:
    return float(exact_M.std(ddof=1 if deviation == "sample" else 0))


def _divided(centered: Float64Array, scale: float, equal: bool) -> Float32Array:
    """Divide; exact zeros where all values were equal, whose mean may differ from them by a rounding error."""
    if equal or scale == 0:
        return np.zeros(centered.size, np.float32)
    return (centered / scale).astype(np.float32)


def _at(arrays: Sequence[ArrayLike], places: Sequence[tuple[int, int]]) -> Float64Array:
    return np.array([np.asarray(arrays[episode])[turn] for episode, turn in places], np.float64)


def _flat(arrays: Sequence[ArrayLike]) -> Float64Array:
    return np.concatenate([np.zeros(0), *(np.asarray(array, np.float64) for array in arrays)])
