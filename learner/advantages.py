"""From rewards to advantages: pure functions on float32 arrays."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rollout.wire.trajectory import Float32Array


def group_normalized(rewards_G: ArrayLike, eps: float = 1e-6) -> Float32Array:
    """Group-relative advantages (r - mean) / (std + eps), Shao et al. 2024 (DeepSeekMath), section 4.1.

    The paper leaves open which standard deviation it takes; this is the population one (divided by G, not by
    G - 1). A group whose rewards are all equal says nothing about its episodes and gets exact zeros.

    rewards_G: [G] reward of each sibling, at least two. Returns float32 [G]. ValueError for a smaller group
    or a reward that is not finite.
    """
    exact_G = np.asarray(rewards_G, dtype=np.float64)
    if exact_G.ndim != 1 or exact_G.size < 2:
        raise ValueError(
            f"a group baseline needs at least 2 rewards, got {exact_G.size}; raise the group size"
        )
    if not np.isfinite(exact_G).all():
        raise ValueError(f"rewards must be finite, got {exact_G.tolist()}; check the environment's rewards")
    if exact_G.min() == exact_G.max():
        return np.zeros(exact_G.size, np.float32)
    return ((exact_G - exact_G.mean()) / (exact_G.std() + eps)).astype(np.float32)


def broadcast(advantage: float, sampled_T: NDArray[np.bool_]) -> Float32Array:
    """One trajectory's advantage at its sampled tokens, zero at every other: bool [T] -> float32 [T]."""
    return np.where(sampled_T, np.float32(advantage), np.float32(0.0))
