"""What a step's groups were, whatever is learned of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from learner.ranks import ALONE, Ranks
from rollout.wire.trajectory import Group, Int32Array, Trajectory

_RUN = 4  # tokens


def describe(groups: Sequence[Group], version: int, ranks: Ranks = ALONE) -> dict[str, float]:
    """What the trained groups of all ranks were, from their trainable episodes alone.

    Of the fresh groups: "reward", "success" (of those with a verdict; absent without any), "turns",
    "sampled_per_episode" (tokens), "episodes", "untrainable_episodes", and "lag_mean", "lag_max": `version`,
    the learner's, minus the weight version that sampled each token; "repetition": the share of the runs of
    four tokens in an answer that stood in it before. Of the reused ones, which say nothing about the present
    policy: "groups_reused", "reused_lag_mean", "reused_lag_max", all absent where nothing was reused.
    """
    fresh = [group for group in groups if not group.reuse]
    reused = [group for group in groups if group.reuse]
    episodes = [trajectory for group in fresh for trajectory in group.trainable]
    played = sum(len(group.trajectories) for group in fresh)
    own = [_facts(trajectory, version) for trajectory in episodes]
    said = ranks.gather([played, own, _lags_of(reused, version)])
    facts = [each for _, of_rank, _ in said for each in of_rank]
    if not facts:
        raise ValueError("a step needs at least one group of trainable episodes, got none")
    rewards, turns, sampled, repetition, success, lags, oldest = zip(*facts, strict=True)
    verdicts = [verdict for verdict in success if verdict is not None]
    metrics = {
        "reward": float(np.mean(rewards)),
        "turns": float(np.mean(turns)),
        "sampled_per_episode": float(np.mean(sampled)),
        "episodes": float(len(facts)),
        "untrainable_episodes": float(sum(count for count, *_ in said) - len(facts)),
        "repetition": float(np.mean(repetition)),
        "lag_mean": sum(lags) / max(sum(sampled), 1),
        "lag_max": float(max(oldest)),
    }
    if verdicts:
        metrics["success"] = float(np.mean(verdicts))
    again, tokens, total, largest = zip(*(lags for *_, lags in said), strict=True)
    if sum(again):
        metrics["groups_reused"] = float(sum(again))
        metrics["reused_lag_mean"] = sum(total) / max(sum(tokens), 1)
        metrics["reused_lag_max"] = float(max(largest))
    return metrics


def _lags_of(groups: Sequence[Group], version: int) -> list[int]:
    """Number of groups and of sampled tokens; sum and maximum of the lags of these."""
    lags = [_lags(trajectory, version) for group in groups for trajectory in group.trainable]
    lags_N = np.concatenate(lags) if lags else np.zeros(0, np.int32)
    return [len(groups), len(lags_N), int(lags_N.sum()), int(lags_N.max(initial=0))]


def _lags(trajectory: Trajectory, version: int) -> Int32Array:
    """Of every sampled token."""
    return version - np.concatenate([step.versions for step in trajectory.steps])


def _facts(trajectory: Trajectory, version: int) -> list[float | bool | None]:
    """Reward, turns, tokens sampled, repetition, verdict; sum and maximum of the lags of its tokens."""
    lags = _lags(trajectory, version)
    return [
        trajectory.reward,
        len(trajectory.steps),
        trajectory.num_sampled,
        _repetition(trajectory),
        trajectory.success,
        int(lags.sum()),
        int(lags.max()) if lags.size else 0,
    ]


def _repetition(trajectory: Trajectory) -> float:
    """Repeated runs of tokens, of all runs in the episode's answers; 0 where no answer is that long."""
    runs = repeated = 0
    for step in trajectory.steps:
        if len(step.action_ids) >= _RUN:
            windows = np.lib.stride_tricks.sliding_window_view(step.action_ids, _RUN)
            runs += len(windows)
            repeated += len(windows) - len(np.unique(windows, axis=0))
    return repeated / runs if runs else 0.0
