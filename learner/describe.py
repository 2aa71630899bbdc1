"""What a step's groups were, whatever is learned of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rollout.wire.trajectory import Group, Trajectory

_RUN = 4  # tokens


def describe(groups: Sequence[Group], version: int) -> dict[str, float]:
    """What the trained groups were, from their trainable episodes alone.

    "reward", "success" (of those with a verdict; absent without any), "turns",
    "sampled_per_episode" (tokens), "episodes", "untrainable_episodes", and "lag_mean", "lag_max": `version`,
    the learner's, minus the weight version that sampled each token; "repetition": the share of the runs of
    four tokens in an answer that stood in it before.
    """
    episodes = [trajectory for group in groups for trajectory in group.trainable]
    if not episodes:
        raise ValueError("a step needs at least one group of trainable episodes, got none")
    lags = version - np.concatenate([step.versions for t in episodes for step in t.steps])
    verdicts = [t.success for t in episodes if t.success is not None]
    metrics = {
        "reward": float(np.mean([t.reward for t in episodes])),
        "turns": float(np.mean([len(t.steps) for t in episodes])),
        "sampled_per_episode": float(np.mean([t.num_sampled for t in episodes])),
        "episodes": float(len(episodes)),
        "untrainable_episodes": float(sum(len(group.trajectories) for group in groups) - len(episodes)),
        "repetition": float(np.mean([_repetition(t) for t in episodes])),
        "lag_mean": float(lags.mean()) if lags.size else 0.0,
        "lag_max": float(lags.max()) if lags.size else 0.0,
    }
    return {**metrics, "success": float(np.mean(verdicts))} if verdicts else metrics


def _repetition(trajectory: Trajectory) -> float:
    """Repeated runs of tokens, of all runs in the episode's answers; 0 where no answer is that long."""
    runs = repeated = 0
    for step in trajectory.steps:
        if len(step.action_ids) >= _RUN:
            windows = np.lib.stride_tricks.sliding_window_view(step.action_ids, _RUN)
            runs += len(windows)
            repeated += len(windows) - len(np.unique(windows, axis=0))
    return repeated / runs if runs else 0.0
