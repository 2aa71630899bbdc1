"""Advantage estimators that have a critic: token by token (PPO), and turn by turn (ArCHer)."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from learner.algorithm import advantages
from learner.algorithm.episode import Episode, TurnValues
from learner.algorithm.estimators import Advantages, Estimator, Groups, regrouped
from learner.parallel.ranks import ALONE, Ranks
from rollout.wire.trajectory import Float32Array


class GaeAdvantage(Estimator):
    """PPO's generalized advantage estimation, token by token, with the critic's values."""

    critic: ClassVar[bool | None] = True
    kind: Literal["gae"] = "gae"
    gamma: float = Field(default=1.0, gt=0, le=1, description="discount factor per token")
    lam: float = Field(
        default=0.95,
        ge=0,
        le=1,
        description="GAE's lambda: 1 uses returns (no bias, high variance), 0 the critic's one-step "
        "differences (bias, low variance)",
    )
    normalize: bool = Field(
        default=True, description="normalize advantages over the batch to mean 0 and standard deviation 1"
    )

    def __call__(self, groups: Groups, ranks: Ranks = ALONE) -> Advantages:
        return self.with_targets(groups, ranks)[0]

    def with_targets(self, groups: Groups, ranks: Ranks = ALONE) -> tuple[Advantages, Advantages]:
        """Advantages and the critic's targets, from one estimate."""
        estimates = [self.estimate(episode) for group in groups for episode in group]
        normal = flat = [advantages_N for advantages_N, _ in estimates]
        if self.normalize:  # an advantage is a difference of a target and a value
            sizes = [np.abs(targets_N) + np.abs(targets_N - own_N) for own_N, targets_N in estimates]
            normal = advantages.globally_normalized(flat, ranks=ranks, magnitudes=sizes)
        return regrouped(normal, groups), regrouped([targets_N for _, targets_N in estimates], groups)

    def estimate(self, episode: Episode) -> tuple[Float32Array, Float32Array]:
        """Advantages before any normalization, and the critic's targets: float32 [N] each."""
        if episode.values is None:
            raise ValueError("advantage.kind='gae' needs the critic's values, but this episode has none")
        before_N = episode.values.before_N
        return advantages.gae(episode.rewards_N, before_N, episode.bootstrap, self.gamma, self.lam)


class TurnAdvantage(Estimator):
    """ArCHer: Q - V of a critic of turns, or returns - V, the same at every sampled token of a turn."""

    critic: ClassVar[bool | None] = True
    kind: Literal["turns"] = "turns"
    of: Literal["action_values", "returns"] = Field(
        default="action_values",
        description="what V is subtracted from. action_values: Q, as the critic has learned it from many episodes. "
        "returns: what followed in this episode, r + gamma ((1 - lam) V(next state) + lam x the next return), by the "
        "critic's gamma and lam",
    )
    normalize: bool = Field(
        default=True, description="normalize over the turns of the batch to mean 0 and standard deviation 1"
    )

    def __call__(self, groups: Groups, ranks: Ranks = ALONE) -> Advantages:
        """0 in episodes without values: reused ones, and all of a step in which the critic is not trusted."""
        episodes = [episode for group in groups for episode in group]
        pairs = [self._compared(episode.turn_values) for episode in episodes]
        flat = [worth_J - before_J for worth_J, before_J in pairs]
        if self.normalize:
            sizes = [np.abs(worth_J) + np.abs(before_J) for worth_J, before_J in pairs]
            flat = advantages.globally_normalized(flat, ranks=ranks, magnitudes=sizes)
        spread = [
            np.repeat(each_J, e.tokens_J) if e.turn_values else e.over_tokens(0.0)
            for each_J, e in zip(flat, episodes, strict=True)
        ]
        return regrouped(spread, groups)

    def _compared(self, values: TurnValues | None) -> tuple[Float32Array, Float32Array]:
        """What each turn is worth, and V before it."""
        if values is None:
            return np.zeros(0, np.float32), np.zeros(0, np.float32)
        worth_J = values.behind_J if self.of == "action_values" else values.ahead_J
        assert worth_J is not None
        return worth_J, values.before_J
