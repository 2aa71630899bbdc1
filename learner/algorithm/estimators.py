"""Advantage estimators: the advantage of every sampled token, from the rewards of a step's groups.

An estimator is a section of the recipe (`learner.algorithm.advantage`, chosen by `kind`) and a function of a rank's
groups of episodes; a normalization over the batch is over the batches of all ranks. The formulas are in advantages.py,
estimators with a critic in valued.py. Only sampled tokens count: tokens of observations move no advantage. A truncated
episode bootstraps from the critic's value of its last state; without a critic that value is 0, and the metric
`truncated_without_bootstrap` is the share of such episodes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import ArrayLike
from pydantic import BaseModel, Field

from learner.algorithm import advantages
from learner.algorithm.advantages import Deviation
from learner.algorithm.episode import Episode, Values, sides
from learner.parallel.ranks import ALONE, Ranks
from rollout.wire.equality import all_equal
from rollout.wire.trajectory import Float32Array

__all__ = ["Episode", "Values", "sides"]  # what an estimator is called with

Groups = Sequence[Sequence[Episode]]  # of siblings
Advantages = list[list[Float32Array]]  # for each episode, [N]


class Estimator(BaseModel, extra="forbid", frozen=True):
    """Base of all estimators: what the other parts need to know of one."""

    turns: ClassVar[bool] = False  # compares turns, so needs episodes of several
    critic: ClassVar[bool | None] = False  # needs a critic; None: works with one or without
    shaped: ClassVar[bool] = True  # reads the episode's reward, to which penalties are added

    @property
    def totals(self) -> bool:
        """Whether it compares total rewards of siblings alone, so that equal totals have no learning signal."""
        return False

    @property
    def siblings(self) -> bool:
        """Whether its baseline is computed from siblings, so that a group of one is refused."""
        return self.totals

    def with_targets(self, groups: Groups, ranks: Ranks = ALONE) -> tuple[Advantages, Advantages]:
        """Advantages and the critic's targets; only of an estimator that uses a critic."""
        raise TypeError(f"{type(self).__name__} uses no critic")


def _deviation() -> Any:
    return Field(
        default="population",
        description="which standard deviation of a group's rewards divides. population: squares divided by G; "
        "sample: by G - 1. For rewards of 0 and 1 in equal numbers, the former gives -1 and 1",
    )


class GrpoAdvantage(Estimator):
    """GRPO: rewards normalized over the siblings; Dr. GRPO with divide=False.

    Siblings count as equal if the task's rewards are equal: divided by their own deviation, even tiny costs of tokens
    would otherwise become the whole advantage of a group without a learning signal.
    """

    kind: Literal["grpo"] = "grpo"
    divide: bool = Field(
        default=True, description="divide by the standard deviation of the group. False is Dr. GRPO"
    )
    deviation: Deviation = _deviation()
    eps: float = Field(
        default=1e-6, ge=0, description="constant added to the standard deviation, for numerical stability"
    )

    @property
    def totals(self) -> bool:
        return True

    def __call__(self, groups: Groups, ranks: Ranks = ALONE) -> Advantages:
        if not self.divide:
            return [_centered(group) for group in groups]

        def compare(rewards_G: ArrayLike, equal: bool) -> Float32Array:
            return advantages.group_normalized(rewards_G, self.eps, equal, self.deviation)

        return [_compared(group, compare, _paid_equal(group)) for group in groups]


class RlooAdvantage(Estimator):
    """RLOO: rewards minus the mean reward of the other siblings."""

    kind: Literal["rloo"] = "rloo"

    @property
    def totals(self) -> bool:
        return True

    def __call__(self, groups: Groups, ranks: Ranks = ALONE) -> Advantages:
        return [_compared(group, advantages.leave_one_out, _earned_equal(group)) for group in groups]


class MaxRlAdvantage(Estimator):
    """MaxRL: rewards minus the group's mean, divided by that mean."""

    kind: Literal["maxrl"] = "maxrl"
    eps: float = Field(
        default=1e-6, ge=0, description="constant added to the mean of the group, for numerical stability"
    )

    @property
    def totals(self) -> bool:
        return True

    def __call__(self, groups: Groups, ranks: Ranks = ALONE) -> Advantages:
        def compare(rewards_G: ArrayLike, equal: bool) -> Float32Array:
            return advantages.mean_normalized(rewards_G, self.eps, equal)

        return [_compared(group, compare, _paid_equal(group)) for group in groups]


class ReinforceAdvantage(Estimator):
    """REINFORCE++, normalized over the whole batch: returns of tokens, or total rewards minus the siblings' mean.

    With `group_baseline` every token gets the episode's total reward minus the mean of its siblings' totals: the return
    from a token on minus that mean would punish every token after an early reward. Hu et al. 2025.
    """

    kind: Literal["reinforce_pp"] = "reinforce_pp"
    gamma: float = Field(
        default=1.0, gt=0, le=1, description="discount factor per token; with group_baseline it must be 1"
    )
    group_baseline: bool = Field(
        default=False,
        description="subtract the mean reward of the group from the episode's reward (REINFORCE++-baseline). "
        "False uses returns of tokens without a group",
    )

    @property
    def totals(self) -> bool:
        return self.group_baseline

    def __call__(self, groups: Groups, ranks: Ranks = ALONE) -> Advantages:
        episodes = [episode for group in groups for episode in group]
        if self.group_baseline:
            flat = [values_N for group in groups for values_N in _centered(group)]
            sizes = [e.over_tokens(e.magnitudes.reward) for e in episodes]
        else:
            flat, sizes = ([self._returns(e) for e in of] for of in (episodes, _magnitudes(episodes)))
        return regrouped(advantages.globally_normalized(flat, ranks=ranks, magnitudes=sizes), groups)

    def _returns(self, episode: Episode) -> Float32Array:
        return advantages.returns(episode.rewards_N, self.gamma, episode.bootstrap)


class ReturnsAdvantage(Estimator):
    """Monte Carlo: every turn gets its return, discounted by turns."""

    kind: Literal["returns"] = "returns"
    gamma: float = Field(default=1.0, gt=0, le=1, description="discount factor per turn")
    baseline: Literal["none", "group", "turn", "batch"] = Field(
        default="group",
        description="turns over which returns are normalized. group: all turns of the group. turn: turns of "
        "the same number in the group. batch: all turns of the batch. none: returns as they are",
    )

    @property
    def siblings(self) -> bool:
        return self.baseline in ("group", "turn")

    def __call__(self, groups: Groups, ranks: Ranks = ALONE) -> Advantages:
        turns = [[episode.turn_returns(self.gamma) for episode in group] for group in groups]
        if self.siblings:
            turns = [self._of_group(group, of_group) for group, of_group in zip(groups, turns, strict=True)]
        elif self.baseline == "batch":
            flat = [values_K for of_group in turns for values_K in of_group]
            sizes = [e.turn_returns(self.gamma) for group in groups for e in _magnitudes(group)]
            normal = advantages.globally_normalized(flat, ranks=ranks, magnitudes=sizes)
            turns = regrouped(normal, groups)
        return [
            [episode.over_tokens(values_K) for episode, values_K in zip(group, of_group, strict=True)]
            for group, of_group in zip(groups, turns, strict=True)
        ]

    def _of_group(self, group: Sequence[Episode], turns: Sequence[Float32Array]) -> list[Float32Array]:
        """Normalize the returns of a group; zeros where the task's rewards are all equal, as in `GrpoAdvantage`."""
        paid, sizes = _paid_returns(group, self.gamma)
        if self.baseline == "turn":
            longest = range(max(len(episode.tokens_K) for episode in group))
            return advantages.turn_normalized(
                turns, equal=all(all_equal(_turn_of(paid, k), _turn_of(sizes, k)) for k in longest)
            )
        if all_equal(np.concatenate(paid), np.concatenate(sizes)):
            return [np.zeros_like(values_K) for values_K in turns]
        return advantages.globally_normalized(turns)


class GigpoAdvantage(Estimator):
    """GiGPO: GRPO over episodes, plus returns of turns normalized over turns that began in the same state."""

    turns: ClassVar[bool] = True
    kind: Literal["gigpo"] = "gigpo"
    gamma: float = Field(default=0.95, gt=0, le=1, description="discount factor per turn")
    weight: float = Field(
        default=1.0, gt=0, description="weight of the turn-level advantage relative to the episode-level one"
    )
    divide: bool = Field(default=True, description="divide both advantages by their standard deviations")
    deviation: Deviation = _deviation()
    eps: float = Field(
        default=1e-6, ge=0, description="constant added to the standard deviations, for numerical stability"
    )

    @property
    def siblings(self) -> bool:
        return True

    def __call__(self, groups: Groups, ranks: Ranks = ALONE) -> Advantages:
        whole = GrpoAdvantage(divide=self.divide, deviation=self.deviation, eps=self.eps)(groups)
        found: Advantages = []
        for group, wholes in zip(groups, whole, strict=True):
            turns = self._turns(group)
            found.append(
                [
                    whole_N + np.float32(self.weight) * episode.over_tokens(turn_K)
                    for episode, whole_N, turn_K in zip(group, wholes, turns, strict=True)
                ]
            )
        return found

    def _turns(self, group: Sequence[Episode]) -> list[Float32Array]:
        values = [episode.turn_returns(self.gamma) for episode in group]
        anchors = [episode.anchors_K for episode in group]
        if self.divide:
            judged = _paid_returns(group, self.gamma)
        else:
            judged = values, [episode.turn_returns(self.gamma) for episode in _magnitudes(group)]
        return advantages.anchored(values, anchors, self.divide, self.eps, judged, self.deviation)


class GdpoAdvantage(Estimator):
    """GDPO: each named reward normalized within the group, weighted sum, normalized over the batch.

    A name that an episode lacks counts 0, as in an episode truncated before that reward. ValueError, on all ranks
    alike, for a name that no episode of the batch has and for a reward that is not finite.
    """

    shaped: ClassVar[bool] = False
    kind: Literal["gdpo"] = "gdpo"
    weights: dict[str, float] = Field(
        min_length=1, description="weight of each named reward in the sum, by name"
    )
    deviation: Deviation = _deviation()
    eps: float = Field(
        default=1e-6,
        ge=0,
        description="constant added to the standard deviations of the groups, for numerical stability",
    )

    @property
    def siblings(self) -> bool:
        return True

    def __call__(self, groups: Groups, ranks: Ranks = ALONE) -> Advantages:
        self._require_named(groups, ranks)
        flat: list[Float32Array] = []
        for group in groups:
            rewards_GR, sizes_GR = (
                [[(named or {}).get(name, 0.0) for name in self.weights] for named in of]
                for of in ([e.named for e in group], [e.named_magnitudes or e.named for e in group])
            )
            weights = list(self.weights.values())
            flat.append(advantages.decoupled(rewards_GR, weights, self.eps, self.deviation, sizes_GR))
        normal = advantages.globally_normalized(flat, ranks=ranks)
        return [
            [episode.over_tokens(value) for episode, value in zip(group, values, strict=True)]
            for group, values in zip(groups, normal, strict=True)
        ]

    def _require_named(self, groups: Groups, ranks: Ranks) -> None:
        own = [(episode.named or {}) for group in groups for episode in group]
        broken = [name for named in own for name in self.weights if not np.isfinite(named.get(name, 0.0))]
        said = ranks.gather([sorted({name for named in own for name in named}), broken])
        given = {name for names, _ in said for name in names}
        for name in self.weights:
            if name not in given:
                has = ", ".join(sorted(given)) or "none"
                raise ValueError(
                    f"advantage.weights names the reward {name!r}, but the batch's episodes have: {has}; fix the name, "
                    "or return that reward in info['rewards']"
                )
            if any(name in names for _, names in said):
                raise ValueError(
                    f"the named reward {name!r} of an episode is not finite; fix the environment"
                )


class NoAdvantage(Estimator):
    """No advantage from rewards: what is learned is the teacher's, by the section distill."""

    kind: Literal["none"] = "none"
    shaped: ClassVar[bool] = False

    def __call__(self, groups: Groups, ranks: Ranks = ALONE) -> Advantages:
        return [[episode.over_tokens(0.0) for episode in group] for group in groups]


def _compared(
    group: Sequence[Episode], compare: Callable[[ArrayLike, bool], Float32Array], equal: bool
) -> list[Float32Array]:
    """One number for each episode, repeated at its sampled tokens. compare: (rewards, whether equal) -> numbers."""
    values = compare([episode.reward for episode in group], equal)
    return [episode.over_tokens(value) for episode, value in zip(group, values, strict=True)]


def _centered(group: Sequence[Episode]) -> list[Float32Array]:
    """The episode's reward minus the group's mean, repeated at its sampled tokens."""
    return _compared(group, advantages.group_centered, _earned_equal(group))


def _magnitudes(group: Sequence[Episode]) -> list[Episode]:
    return [episode.magnitudes for episode in group]


def _paid_equal(group: Sequence[Episode]) -> bool:
    """Whether the task's rewards of the siblings are equal, without the costs of tokens."""
    return all_equal([e.paid for e in group], [e.paid for e in _magnitudes(group)])


def _earned_equal(group: Sequence[Episode]) -> bool:
    """Whether the rewards of the siblings are equal, costs of tokens included."""
    return all_equal([e.reward for e in group], [e.reward for e in _magnitudes(group)])


def _paid_returns(group: Sequence[Episode], gamma: float) -> tuple[list[Float32Array], list[Float32Array]]:
    """Returns of the task's rewards, [K] for each episode, and the returns of their magnitudes."""
    paid, sizes = (
        [episode.turn_returns(gamma, costs=False) for episode in of] for of in (group, _magnitudes(group))
    )
    return paid, sizes


def _turn_of(arrays: Sequence[Float32Array], turn: int) -> list[float]:
    return [float(array[turn]) for array in arrays if len(array) > turn]


def regrouped(flat: Sequence[Float32Array], groups: Groups) -> Advantages:
    """One array for each episode, in the groups that the episodes came in."""
    remaining = iter(flat)
    return [[next(remaining) for _ in group] for group in groups]
