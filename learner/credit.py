"""Who deserves what: the advantage of every sampled token, from the rewards of a step's groups.

An estimator is a section of the recipe (`learner.algorithm.credit`, its `kind` says which) and a function of groups of
episodes: a rank's own, and what is normalized over the batch is over that of all ranks. The formulas are in
advantages.py. Only sampled tokens count: what observations add between turns moves no advantage. A truncated episode is
worth what the critic says its last state is; without a critic what came after is taken for nothing, and the metric
`cut_short` says how many episodes that touched.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import numpy as np
from numpy.typing import ArrayLike
from pydantic import BaseModel, Field

from learner import advantages
from learner.advantages import Float64Array
from learner.ranks import ALONE, Ranks
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
    token_rewards_N: Float32Array | None = None  # what the divergence from a reference costs each token
    values: Values | None = None
    sides_K: tuple[float, ...] = ()  # what a turn's advantage counts, see `sides`; (): 1 everywhere

    @classmethod
    def of(cls, trajectory: Trajectory) -> Episode:
        """The facts of a trainable trajectory."""
        steps = trajectory.steps
        return cls(
            rewards_K=np.array([step.reward for step in steps], np.float64),
            tokens_K=tuple(len(step.action_ids) for step in steps),
            ended=trajectory.end_reason in (EndReason.TERMINATED, EndReason.MALFORMED),
            anchors_K=tuple(step.observation for step in steps),
            named=trajectory.named_rewards,
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


Groups = Sequence[Sequence[Episode]]  # of siblings
Credit = list[list[Float32Array]]  # for each episode, [N]


class _Estimator(BaseModel, extra="forbid", frozen=True):
    # Compares the rewards of whole episodes with their siblings' and nothing else: equal ones have no advantage.
    totals: ClassVar[bool] = False
    turns: ClassVar[bool] = False  # compares turns: nothing is gained on episodes of one
    critic: ClassVar[bool] = False  # asks a critic
    shaped: ClassVar[bool] = True  # reads the episode's reward, to which penalties are added

    @property
    def siblings(self) -> bool:
        """Whether its baseline is of episodes of one task: a group of one has nothing to compare with."""
        return self.totals


class GroupCredit(_Estimator):
    """GRPO: rewards compared with the siblings'; without `divide` it is Dr. GRPO.

    Whether siblings earned the same is asked of what the task paid: divided by its own deviation, what their tokens
    cost would else be the whole advantage of a group that the task says nothing of, however little it is.
    """

    totals: ClassVar[bool] = True
    kind: Literal["group"] = "group"
    divide: bool = Field(default=True, description="by the group's standard deviation")
    eps: float = Field(default=1e-6, ge=0, description="added to the standard deviation")

    def __call__(self, groups: Groups, ranks: Ranks = ALONE) -> Credit:
        def compare(rewards_G: ArrayLike, paid_G: ArrayLike) -> Float32Array:
            if self.divide:
                return advantages.group_normalized(rewards_G, self.eps, paid_G)
            return advantages.group_centered(rewards_G)

        return [_compared(group, compare) for group in groups]


class LeaveOneOutCredit(_Estimator):
    """RLOO: rewards against the mean of the siblings'."""

    totals: ClassVar[bool] = True
    kind: Literal["rloo"] = "rloo"

    def __call__(self, groups: Groups, ranks: Ranks = ALONE) -> Credit:
        return [_compared(group, lambda r, _: advantages.leave_one_out(r)) for group in groups]


class MaximumLikelihoodCredit(_Estimator):
    """MaxRL: rewards against the group's mean, divided by it."""

    totals: ClassVar[bool] = True
    kind: Literal["maxrl"] = "maxrl"
    eps: float = Field(default=1e-6, ge=0, description="added to the mean")

    def __call__(self, groups: Groups, ranks: Ranks = ALONE) -> Credit:
        return [
            _compared(group, lambda r, paid: advantages.mean_normalized(r, self.eps, paid))
            for group in groups
        ]


class ReinforceCredit(_Estimator):
    """REINFORCE++: returns of tokens, normalized over the whole batch."""

    kind: Literal["reinforce_pp"] = "reinforce_pp"
    gamma: float = Field(default=1.0, gt=0, le=1, description="discount from token to token")
    group_baseline: bool = Field(
        default=False, description="take the mean of the siblings' rewards away first"
    )

    @property
    def siblings(self) -> bool:
        return self.group_baseline

    def __call__(self, groups: Groups, ranks: Ranks = ALONE) -> Credit:
        flat = []
        for group in groups:
            mean = np.mean([episode.reward for episode in group]) if self.group_baseline else 0.0
            flat += [
                advantages.returns(e.rewards_N, self.gamma, e.bootstrap) - np.float32(mean) for e in group
            ]
        return _regrouped(advantages.globally_normalized(flat, ranks=ranks), groups)


class ReturnsCredit(_Estimator):
    """Monte Carlo: every turn is worth what followed it, discounted by turns."""

    kind: Literal["returns"] = "returns"
    gamma: float = Field(default=1.0, gt=0, le=1, description="discount from turn to turn")
    baseline: Literal["none", "group", "batch"] = Field(
        default="group",
        description="what returns are normalized over: the turns of the group, those of the batch, or nothing",
    )

    @property
    def siblings(self) -> bool:
        return self.baseline == "group"

    def __call__(self, groups: Groups, ranks: Ranks = ALONE) -> Credit:
        turns = [[episode.turn_returns(self.gamma) for episode in group] for group in groups]
        if self.baseline == "group":
            turns = [self._of_group(group, of_group) for group, of_group in zip(groups, turns, strict=True)]
        elif self.baseline == "batch":
            flat = [values_K for of_group in turns for values_K in of_group]
            turns = _regrouped(advantages.globally_normalized(flat, ranks=ranks), groups)
        return [
            [episode.over_tokens(values_K) for episode, values_K in zip(group, of_group, strict=True)]
            for group, of_group in zip(groups, turns, strict=True)
        ]

    def _of_group(self, group: Sequence[Episode], turns: Sequence[Float32Array]) -> list[Float32Array]:
        """Normalized; zeros where the task paid all the same, as in `GroupCredit`."""
        paid = np.concatenate([episode.turn_returns(self.gamma, costs=False) for episode in group])
        if paid.size and paid.min() == paid.max():
            return [np.zeros_like(values_K) for values_K in turns]
        return advantages.globally_normalized(turns)


class AnchoredCredit(_Estimator):
    """GiGPO: episodes against their siblings, plus every turn against the turns that began in the same state."""

    turns: ClassVar[bool] = True
    kind: Literal["gigpo"] = "gigpo"
    gamma: float = Field(default=0.95, gt=0, le=1, description="discount from turn to turn")
    weight: float = Field(default=1.0, gt=0, description="of the comparison of turns")
    divide: bool = Field(default=True, description="by the standard deviations")
    eps: float = Field(default=1e-6, ge=0, description="added to the standard deviations")

    @property
    def siblings(self) -> bool:
        return True

    def __call__(self, groups: Groups, ranks: Ranks = ALONE) -> Credit:
        whole = GroupCredit(divide=self.divide, eps=self.eps)(groups)
        credit: Credit = []
        for group, wholes in zip(groups, whole, strict=True):
            values = [episode.turn_returns(self.gamma) for episode in group]
            anchors = [episode.anchors_K for episode in group]
            paid = [e.turn_returns(self.gamma, costs=False) for e in group] if self.divide else None
            turns = advantages.anchored(values, anchors, self.divide, self.eps, paid)
            credit.append(
                [
                    whole_N + np.float32(self.weight) * episode.over_tokens(turn_K)
                    for episode, whole_N, turn_K in zip(group, wholes, turns, strict=True)
                ]
            )
        return credit


class DecoupledCredit(_Estimator):
    """GDPO: each of the environment's named rewards compared by itself, summed, normalized over the batch.

    A name that an episode lacks, one that was cut off before it was given say, counts 0. ValueError, on all ranks
    alike, for one that no episode of the batch has, and for a reward that is not finite.
    """

    shaped: ClassVar[bool] = False
    kind: Literal["gdpo"] = "gdpo"
    weights: dict[str, float] = Field(min_length=1, description="named reward -> weight")
    eps: float = Field(default=1e-6, ge=0, description="added to the standard deviations")

    @property
    def siblings(self) -> bool:
        return True

    def __call__(self, groups: Groups, ranks: Ranks = ALONE) -> Credit:
        self._require_named(groups, ranks)
        flat: list[Float32Array] = []
        for group in groups:
            rewards_GR = [[(e.named or {}).get(name, 0.0) for name in self.weights] for e in group]
            flat.append(advantages.decoupled(rewards_GR, list(self.weights.values()), self.eps))
        normal = advantages.globally_normalized(flat, self.eps, ranks)
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
                    f"credit.weights names the reward {name!r}, but the batch's episodes have {has}; an environment "
                    "gives them in info['rewards']"
                )
            if any(name in names for _, names in said):
                raise ValueError(f"the named reward {name!r} of an episode is not finite")


class GaeCredit(_Estimator):
    """PPO's generalized advantage estimation, token by token, with the critic's values."""

    critic: ClassVar[bool] = True
    kind: Literal["gae"] = "gae"
    gamma: float = Field(default=1.0, gt=0, le=1, description="discount from token to token")
    lam: float = Field(default=0.95, ge=0, le=1, description="how far rewards are trusted rather than values")
    normalize: bool = Field(default=True, description="over the batch")

    def __call__(self, groups: Groups, ranks: Ranks = ALONE) -> Credit:
        return self.with_targets(groups, ranks)[0]

    def with_targets(self, groups: Groups, ranks: Ranks = ALONE) -> tuple[Credit, Credit]:
        """Advantages, and what the critic should have said: both come of one estimate."""
        estimates = [self.estimate(episode) for group in groups for episode in group]
        flat = [advantages_N for advantages_N, _ in estimates]
        normal = advantages.globally_normalized(flat, ranks=ranks) if self.normalize else flat
        return _regrouped(normal, groups), _regrouped([targets_N for _, targets_N in estimates], groups)

    def estimate(self, episode: Episode) -> tuple[Float32Array, Float32Array]:
        """Advantages before any normalization, and the critic's targets: float32 [N] each."""
        if episode.values is None:
            raise ValueError("credit.kind='gae' needs the critic's values, and this episode has none")
        before_N = episode.values.before_N
        return advantages.gae(episode.rewards_N, before_N, episode.bootstrap, self.gamma, self.lam)


AnyCredit = Annotated[
    GroupCredit
    | LeaveOneOutCredit
    | MaximumLikelihoodCredit
    | ReinforceCredit
    | ReturnsCredit
    | AnchoredCredit
    | DecoupledCredit
    | GaeCredit,
    Field(discriminator="kind"),
]


def _compared(
    group: Sequence[Episode], compare: Callable[[ArrayLike, ArrayLike], Float32Array]
) -> list[Float32Array]:
    """One number for each episode, at all of its sampled tokens. compare: of (rewards, what the task paid of them)."""
    values = compare([episode.reward for episode in group], [episode.paid for episode in group])
    return [episode.over_tokens(value) for episode, value in zip(group, values, strict=True)]


def _regrouped(flat: Sequence[Float32Array], groups: Groups) -> Credit:
    remaining = iter(flat)
    return [[next(remaining) for _ in group] for group in groups]
