"""An episode as an advantage estimator sees it: rewards of its turns, costs of its tokens, values of a critic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike

from learner.algorithm import advantages
from learner.algorithm.advantages import Float64Array
from rollout.wire.trajectory import EndReason, Float32Array, Trajectory


@dataclass(frozen=True, slots=True)
class Values:
    """What the critic says of an episode: before each sampled token (float32 [N]) and after the last one."""

    before_N: Float32Array
    after: float


@dataclass(frozen=True, slots=True)
class Episode:
    """One episode as an estimator sees it. K turns, N sampled tokens."""

    rewards_K: Float64Array  # of the turns, shaped
    tokens_K: tuple[int, ...]  # sampled in each turn
    ended: bool  # False: cut off in a state that was not final
    anchors_K: tuple[str, ...] = ()  # the state each turn began in
    named: Mapping[str, float] | None = None  # sums of the environment's named rewards
    named_magnitudes: Mapping[str, float] | None = (
        None  # sums of their absolute values; None: theirs as they are
    )
    token_rewards_N: Float32Array | None = None  # what the divergence from a reference costs each token
    values: Values | None = None
    sides_K: tuple[float, ...] = ()  # what a turn's advantage counts, see `sides`; (): 1 everywhere

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
            sides_K=sides([step.seat for step in steps]),
        )

    @property
    def paid(self) -> float:
        """What the task paid for the whole episode, whatever its tokens cost."""
        return float(self.rewards_K.sum())

    @property
    def reward(self) -> float:
        """Of the whole episode."""
        extra = 0.0 if self.token_rewards_N is None else float(self.token_rewards_N.sum(dtype=np.float64))
        return self.paid + extra

    @property
    def magnitudes(self) -> Episode:
        """The same with the absolute value of every reward and value: its sums bound the rounding of sums."""
        tokens_N, values = self.token_rewards_N, self.values
        return replace(
            self,
            rewards_K=np.abs(self.rewards_K),
            token_rewards_N=None if tokens_N is None else np.abs(tokens_N),
            values=None if values is None else Values(np.abs(values.before_N), abs(values.after)),
        )

    @property
    def rewards_N(self) -> Float64Array:
        """Each turn's reward at its last sampled token, and what tokens cost."""
        size = sum(self.tokens_K)
        rewards_N = np.zeros(size)
        if size:  # a turn without a token leaves its reward to the one before
            np.add.at(rewards_N, np.maximum(np.cumsum(self.tokens_K) - 1, 0), self.rewards_K)
        return rewards_N if self.token_rewards_N is None else rewards_N + self.token_rewards_N

    @property
    def bootstrap(self) -> float:
        """Value of the state it was cut off in, as far as a critic knows."""
        return 0.0 if self.ended or self.values is None else self.values.after

    @property
    def sides_N(self) -> Float32Array:
        """What an advantage counts for each sampled token."""
        return self.over_tokens(self.sides_K or 1)

    def over_tokens(self, values_K: ArrayLike) -> Float32Array:
        """A number for each turn, or one for all, at each sampled token: float32 [N]."""
        wide_K = np.broadcast_to(np.asarray(values_K, np.float32), (len(self.tokens_K),))
        return np.repeat(wide_K, self.tokens_K)

    def turn_returns(self, gamma: float, costs: bool = True) -> Float32Array:
        """Discounted by turns, float32 [K]; what tokens cost belongs to their turn, and may be left away."""
        rewards_K = self.rewards_K
        if costs and self.token_rewards_N is not None:
            borders = np.cumsum(self.tokens_K)[:-1]
            rewards_K = rewards_K + np.array(
                [part.sum(dtype=np.float64) for part in np.split(self.token_rewards_N, borders)]
            )
        return advantages.returns(rewards_K, gamma, self.bootstrap)


def sides(seats_K: Sequence[int | None]) -> tuple[float, ...]:
    """What each turn's advantage counts in a game the agent plays with itself: 1 for seat 0, -1 for seat 1.

    Rewards and values are the first side's. In a game of two whose gains are each other's losses, whatever an
    estimator makes of them is the other side's with its sign turned. A turn that no move was made in (a thought, a
    call of a tool) belongs to the move that follows; where none does, to nobody: 0. No seat anywhere: ().
    """
    if not any(seat is not None for seat in seats_K):
        return ()
    found: list[float] = []
    following = 0.0
    for seat in reversed(seats_K):
        following = following if seat is None else 1.0 - 2.0 * seat
        found.append(following)
    return tuple(reversed(found))
