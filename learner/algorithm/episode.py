"""An episode as input of an advantage estimator: rewards of turns, costs of tokens, values of a critic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from learner.algorithm import advantages
from learner.algorithm.advantages import Float64Array
from rollout.wire.trajectory import EndReason, Float32Array, Trajectory


@dataclass(frozen=True, slots=True)
class Values:
    """The critic's values of an episode: before each sampled token (float32 [N]) and after the last one."""

    before_N: Float32Array
    after: float


@dataclass(frozen=True, slots=True)
class TurnValues:
    """Values of the J turns that sampled tokens: before the first of them, V, and behind the last, Q; float32 [J].

    ahead_J: what the recorded turns brought, with V of what followed them: see `advantages.turn_targets`.
    """

    before_J: Float32Array
    behind_J: Float32Array
    ahead_J: Float32Array | None = None


@dataclass(frozen=True, slots=True)
class Episode:
    """One episode of K turns and N sampled tokens; J of the turns sampled any."""

    rewards_K: Float64Array  # of the turns, shaped
    tokens_K: tuple[int, ...]  # sampled in each turn
    ended: bool  # False: truncated in a state that was not final
    anchors_K: tuple[str, ...] = ()  # the state each turn began in
    named: Mapping[str, float] | None = None  # sums of the environment's named rewards
    named_magnitudes: Mapping[str, float] | None = None  # sums of absolute values; None: the named rewards
    costs: Mapping[str, Float64Array] = field(default_factory=dict)  # [K] each, by name: see constraints.py
    token_rewards_N: Float32Array | None = None  # KL penalty of each token
    values: Values | None = None
    turn_values: TurnValues | None = None  # of a critic of turns
    sides_K: tuple[float, ...] = ()  # sign of each turn's advantage, see `sides`; (): 1 everywhere

    @classmethod
    def of(cls, trajectory: Trajectory) -> Episode:
        """The facts of a trainable trajectory."""
        steps = trajectory.turns
        return cls(
            rewards_K=np.array([step.reward for step in steps], np.float64),
            tokens_K=tuple(len(step.action_ids) for step in steps),
            ended=trajectory.end_reason in (EndReason.TERMINATED, EndReason.MALFORMED),
            anchors_K=tuple(step.observation for step in steps),
            named=trajectory.named_rewards,
            named_magnitudes=trajectory.named_magnitudes,
            costs={name: np.array(costs_K, np.float64) for name, costs_K in trajectory.costs.items()},
            sides_K=sides([step.seat for step in steps]),
        )

    @property
    def paid(self) -> float:
        """The task's reward of the whole episode, without the costs of its tokens."""
        return float(self.rewards_K.sum())

    @property
    def reward(self) -> float:
        """Reward of the whole episode, costs of its tokens included."""
        extra = 0.0 if self.token_rewards_N is None else float(self.token_rewards_N.sum(dtype=np.float64))
        return self.paid + extra

    @property
    def magnitudes(self) -> Episode:
        """The episode with the absolute value of every reward and value; its sums bound the rounding of sums."""
        tokens_N, values = self.token_rewards_N, self.values
        return replace(
            self,
            rewards_K=np.abs(self.rewards_K),
            token_rewards_N=None if tokens_N is None else np.abs(tokens_N),
            values=None if values is None else Values(np.abs(values.before_N), abs(values.after)),
        )

    @property
    def rewards_N(self) -> Float64Array:
        """Rewards of tokens: each turn's reward at its last sampled token, plus the costs of tokens."""
        size = sum(self.tokens_K)
        rewards_N = np.zeros(size)
        if size:  # the reward of a turn without a token goes to the token before it
            np.add.at(rewards_N, np.maximum(np.cumsum(self.tokens_K) - 1, 0), self.rewards_K)
        return rewards_N if self.token_rewards_N is None else rewards_N + self.token_rewards_N

    @property
    def tokens_J(self) -> NDArray[np.int64]:
        """Tokens of each turn that sampled any: int64 [J]."""
        return np.array([count for count in self.tokens_K if count], np.int64)

    @property
    def rewards_J(self) -> Float64Array:
        """Rewards of these turns, costs of their tokens included: those of `rewards_N`, added up."""
        turns = len(self.tokens_J)
        return np.bincount(np.repeat(np.arange(turns), self.tokens_J), self.rewards_N, turns).astype(
            np.float64
        )

    @property
    def bootstrap(self) -> float:
        """The critic's value of the last state of a truncated episode; 0 without a critic or after a real end."""
        return 0.0 if self.ended or self.values is None else self.values.after

    @property
    def sides_N(self) -> Float32Array:
        """Sign of the advantage at each sampled token."""
        return self.over_tokens(self.sides_K or 1)

    def over_tokens(self, values_K: ArrayLike) -> Float32Array:
        """Repeat a number for each turn, or one for all, at each sampled token: float32 [N]."""
        wide_K = np.broadcast_to(np.asarray(values_K, np.float32), (len(self.tokens_K),))
        return np.repeat(wide_K, self.tokens_K)

    def turn_returns(self, gamma: float, costs: bool = True) -> Float32Array:
        """Returns discounted by turns, float32 [K]; costs of tokens are added to their turn unless costs=False."""
        rewards_K = self.rewards_K
        if costs and self.token_rewards_N is not None:
            borders = np.cumsum(self.tokens_K)[:-1]
            rewards_K = rewards_K + np.array(
                [part.sum(dtype=np.float64) for part in np.split(self.token_rewards_N, borders)]
            )
        return advantages.returns(rewards_K, gamma, self.bootstrap)


def sides(seats_K: Sequence[int | None]) -> tuple[float, ...]:
    """Sign of each turn's advantage in self-play: 1 for player 0, -1 for player 1.

    Rewards and values are player 0's. In a zero-sum game of two the advantage of player 1 is that of player 0 with its
    sign turned. A turn without a move (a thought, a tool call) belongs to the player of the next move; without a next
    move its sign is 0. Without any player: ().
    """
    if not any(seat is not None for seat in seats_K):
        return ()
    found: list[float] = []
    following = 0.0
    for seat in reversed(seats_K):
        following = following if seat is None else 1.0 - 2.0 * seat
        found.append(following)
    return tuple(reversed(found))
