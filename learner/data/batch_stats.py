"""Statistics of a step's groups, independent of the algorithm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from learner.parallel.ranks import ALONE, Ranks
from rollout.wire.metrics import joined
from rollout.wire.trajectory import EnvironmentKey, Group, Int32Array, Trajectory

_RUN = 4  # tokens


@dataclass(frozen=True, slots=True)
class _Facts:
    """Numbers of one fresh, trainable episode, as ranks exchange them."""

    reward: float
    named: dict[str, float]  # rewards and costs, as their metrics begin
    success: bool | None
    turns: int
    tokens: int  # sampled
    repetition: float
    lags: int  # sum over the tokens
    oldest: int  # lag of a token
    environment: str  # its name in a run with several, else empty

    @classmethod
    def of(cls, trajectory: Trajectory, version: int, environment: str) -> _Facts:
        lags = _lags(trajectory, version)
        return cls(
            reward=trajectory.reward,
            named={f"rewards/{name}": total for name, total in trajectory.named_rewards.items()}
            | {f"costs/{name}": sum(costs_K) for name, costs_K in trajectory.costs.items()},
            success=trajectory.success,
            turns=len(trajectory.turns),
            tokens=trajectory.num_sampled,
            repetition=_repetition(trajectory),
            lags=int(lags.sum()),
            oldest=int(lags.max()) if lags.size else 0,
            environment=environment,
        )


def describe(
    groups: Sequence[Group],
    version: int,
    ranks: Ranks = ALONE,
    verdicts: bool = False,
    environments: Mapping[EnvironmentKey, str] | None = None,
) -> dict[str, float]:
    """Statistics of the trained groups of all ranks. Shares and means are over all trainable episodes: those that no
    infrastructure failure ended, as in an evaluation.

    Of the fresh groups: "reward" with "reward_std", "reward_min", "reward_max"; "success" (an episode without a verdict
    counts as no success; absent if no episode has one, unless `verdicts` says that the environment gives them); "turns"
    and "sampled_per_episode" (tokens), each with "_p50", "_p95", "_max"; "episodes", "untrainable_episodes";
    "lag_mean", "lag_max": `version`, the learner's, minus the weight version that sampled each token; "repetition": the
    share of 4-grams of tokens in an answer that occurred in it before; "rewards/NAME/mean", "/std", "/min", "/max" of
    every named reward (an episode that lacks it counts 0), "costs/NAME/mean" and so on of every cost. Some of these
    again for each environment that has a name in `environments`, as "env/NAME/reward". Of reused groups, which do not
    describe the present policy: "groups_reused", "reused_lag_mean", "reused_lag_max", all absent without reuse.
    """
    fresh = [group for group in groups if not group.reuse]
    reused = [group for group in groups if group.reuse]
    episodes = [trajectory for group in fresh for trajectory in group.trainable]
    played = sum(len(group.trajectories) for group in fresh)
    names = environments or {}
    own = [asdict(_Facts.of(each, version, names.get(each.task.environment, ""))) for each in episodes]
    said = ranks.gather([played, own, _lags_of(reused, version)])
    facts = [_Facts(**each) for _, of_rank, _ in said for each in of_rank]
    if not facts:
        raise ValueError("a step needs at least one group of trainable episodes, got none")
    tokens = sum(each.tokens for each in facts)
    metrics = {
        "episodes": float(len(facts)),
        "untrainable_episodes": float(sum(count for count, *_ in said) - len(facts)),
        "repetition": float(np.mean([each.repetition for each in facts])),
        "lag_mean": sum(each.lags for each in facts) / max(tokens, 1),
        "lag_max": float(max(each.oldest for each in facts)),
    }
    if verdicts or any(each.success is not None for each in facts):
        metrics["success"] = float(np.mean([bool(each.success) for each in facts]))
    parts = _of_rewards(facts), _of_lengths(facts), _of_environments(facts)
    return joined(metrics, *parts, _of_reuse([lags for *_, lags in said]))


def _of_environments(facts: Sequence[_Facts]) -> dict[str, float]:
    found: dict[str, float] = {}
    for name in sorted({each.environment for each in facts} - {""}):
        own = [each for each in facts if each.environment == name]
        mean, deviation, *_ = _moments([each.reward for each in own])
        metrics = {
            "episodes": float(len(own)),
            "reward": mean,
            "reward_std": deviation,
            "turns": float(np.mean([each.turns for each in own])),
            "sampled_per_episode": float(np.mean([each.tokens for each in own])),
        }
        if any(each.success is not None for each in own):
            metrics["success"] = float(np.mean([bool(each.success) for each in own]))
        found |= {f"env/{name}/{metric}": value for metric, value in metrics.items()}
    return found


def _of_rewards(facts: Sequence[_Facts]) -> dict[str, float]:
    mean, *rest = _moments([each.reward for each in facts])
    found = {"reward": mean} | dict(zip(("reward_std", "reward_min", "reward_max"), rest, strict=True))
    for name in sorted({name for each in facts for name in each.named}):
        moments = _moments([each.named.get(name, 0.0) for each in facts])
        ways = [f"{name}/{way}" for way in ("mean", "std", "min", "max")]
        found |= dict(zip(ways, moments, strict=True))
    return found


def _of_lengths(facts: Sequence[_Facts]) -> dict[str, float]:
    lengths = {
        "turns": [each.turns for each in facts],
        "sampled_per_episode": [each.tokens for each in facts],
    }
    found: dict[str, float] = {}
    for name, values in lengths.items():
        middle, long = np.percentile(values, [50, 95])
        found |= {name: float(np.mean(values)), f"{name}_p50": float(middle), f"{name}_p95": float(long)}
        found[f"{name}_max"] = float(max(values))
    return found


def _of_reuse(lags: Sequence[Sequence[int]]) -> dict[str, float]:
    """Metrics of reuse from the `_lags_of` of every rank."""
    again, tokens, total, largest = zip(*lags, strict=True)
    if not sum(again):
        return {}
    return {
        "groups_reused": float(sum(again)),
        "reused_lag_mean": sum(total) / max(sum(tokens), 1),
        "reused_lag_max": float(max(largest)),
    }


def _moments(values: Sequence[float]) -> tuple[float, float, float, float]:
    """Mean, population standard deviation, minimum, maximum."""
    return float(np.mean(values)), float(np.std(values)), float(min(values)), float(max(values))


def _lags_of(groups: Sequence[Group], version: int) -> list[int]:
    """Number of groups and of sampled tokens, and sum and maximum of the tokens' lags."""
    lags = [_lags(trajectory, version) for group in groups for trajectory in group.trainable]
    lags_N = np.concatenate(lags) if lags else np.zeros(0, np.int32)
    return [len(groups), len(lags_N), int(lags_N.sum()), int(lags_N.max(initial=0))]


def _lags(trajectory: Trajectory, version: int) -> Int32Array:
    """Lag of every sampled token, in versions."""
    return version - np.concatenate([step.versions for step in trajectory.turns])


def _repetition(trajectory: Trajectory) -> float:
    """Share of repeated 4-grams in the episode's answers; 0 if no answer has four tokens."""
    runs = repeated = 0
    for step in trajectory.turns:
        if len(step.action_ids) >= _RUN:
            windows = np.lib.stride_tricks.sliding_window_view(step.action_ids, _RUN)
            runs += len(windows)
            repeated += len(windows) - len(np.unique(windows, axis=0))
    return repeated / runs if runs else 0.0
