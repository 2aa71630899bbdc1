"""The training objective as a composition: advantage, loss, aggregation, corrections, regularizers.

    rewards -> estimator -> advantages                  credit of each token                estimators.py
    logprobs -> loss [N] x corrections [N]              policy loss, off-policy weights     losses.py, corrections.py
            + kl + entropy [N]                          penalties and bonuses               regularizers.py
            x weights [N] -> one number                 weight of each token                aggregation.py

Every part is a section of a recipe, chosen by its `kind`: a built-in one, or a user's own as "module:name" (own.py).
No code depends on an algorithm's name.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, model_validator

from learner.algorithm.aggregation import Aggregation
from learner.algorithm.constraints import Constraints
from learner.algorithm.corrections import AnyCorrection
from learner.algorithm.distillation import DistillSettings
from learner.algorithm.estimators import (
    GdpoAdvantage,
    GigpoAdvantage,
    GrpoAdvantage,
    MaxRlAdvantage,
    NoAdvantage,
    ReinforceAdvantage,
    ReturnsAdvantage,
    RlooAdvantage,
)
from learner.algorithm.losses import AnyLoss, ClippedLoss
from learner.algorithm.own import OwnCorrection, OwnEstimator, OwnLoss, OwnRegularizer
from learner.algorithm.regularizers import KlSettings, OverlongSettings
from learner.algorithm.schedule import OptimSettings
from learner.algorithm.valued import GaeAdvantage, TurnAdvantage
from rollout.wire.own_part import BUILT_IN, BY_KIND, OWN


class _CriticSettings(BaseModel, extra="forbid", frozen=True):
    warmup_steps: int = Field(
        default=0,
        ge=0,
        description="first learner steps in which only the critic is trained and the policy stays fixed",
    )

    @property
    def updates(self) -> int | None:
        """Optimizer steps of a learner step; None: as many as the policy makes."""
        return None


class _TokenCriticSettings(_CriticSettings):
    value_clip: float | None = Field(
        default=0.2,
        gt=0,
        description="PPO's value clipping: largest change of a predicted value per batch, in units of reward. "
        "Not set: no clipping",
    )


class OwnCriticSettings(_TokenCriticSettings):
    """A critic of its own: a second model of the policy's architecture with a value head."""

    kind: Literal["own"] = "own"
    optim: OptimSettings = Field(
        default=OptimSettings(learning_rate=1e-5), description="optimizer of the critic"
    )


class SharedCriticSettings(_TokenCriticSettings):
    """A value head on the policy's last hidden states, trained in the policy's own backward pass."""

    kind: Literal["shared"] = "shared"
    optim: OptimSettings = Field(
        default=OptimSettings(learning_rate=1e-3), description="optimizer of the value head"
    )
    value_coefficient: float = Field(
        default=0.5, gt=0, description="weight of the value loss relative to the policy loss"
    )
    detach: bool = Field(
        default=False,
        description="stop the gradient of the value loss at the policy's hidden states, so that only the head "
        "learns from it",
    )


class TurnCriticSettings(_CriticSettings):
    """A critic of turns: a second model with two value heads, learned off-policy towards its own slow copy."""

    kind: Literal["turns"] = "turns"
    optim: OptimSettings = Field(
        default=OptimSettings(learning_rate=1e-5), description="optimizer of the critic"
    )
    gamma: float = Field(default=0.95, gt=0, le=1, description="discount factor per turn")
    lam: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="share of later rewards in place of the value of the next turn's state in a target: 0 looks one "
        "turn ahead, 1 to the end of the episode",
    )
    target_rate: float = Field(
        default=0.1,
        gt=0,
        le=1,
        description="share of the way that the slow copy goes towards the critic in an optimizer step",
    )
    passes: int = Field(
        default=2, ge=1, description="passes over the fresh and the reused groups in a learner step"
    )
    minibatches: int = Field(default=8, ge=1, description="optimizer steps in a pass")
    trust: float = Field(
        default=0.2,
        ge=0,
        lt=1,
        description="the policy moves only in steps in which Q - V, on fresh episodes that the critic has not learned "
        "from, correlates with r + gamma V(next state) - V at least so much; 0: in every step",
    )

    @property
    def updates(self) -> int | None:
        return self.passes * self.minibatches


AnyEstimator = Annotated[
    GrpoAdvantage
    | RlooAdvantage
    | MaxRlAdvantage
    | ReinforceAdvantage
    | ReturnsAdvantage
    | GigpoAdvantage
    | GdpoAdvantage
    | GaeAdvantage
    | TurnAdvantage
    | NoAdvantage,
    Field(discriminator="kind"),
]
EstimatorSettings = Annotated[
    Annotated[AnyEstimator, BUILT_IN] | Annotated[OwnEstimator, OWN],
    BY_KIND,
]
LossSettings = Annotated[Annotated[AnyLoss, BUILT_IN] | Annotated[OwnLoss, OWN], BY_KIND]
CorrectionSettings = Annotated[Annotated[AnyCorrection, BUILT_IN] | Annotated[OwnCorrection, OWN], BY_KIND]
AnyCritic = Annotated[
    OwnCriticSettings | SharedCriticSettings | TurnCriticSettings, Field(discriminator="kind")
]


class AlgorithmSettings(BaseModel, extra="forbid", frozen=True):
    """A policy-gradient method, part by part. The default is GRPO with separate clips, as in DAPO."""

    advantage: EstimatorSettings = Field(
        default=GrpoAdvantage(),
        description="advantage estimator: from the rewards of a step's groups to an advantage per token",
    )
    loss: LossSettings = Field(default=ClippedLoss(), description="policy loss per token")
    aggregation: Aggregation = Field(
        default="token",
        description="how token losses are averaged. token: over all tokens of the batch. sequence: first over "
        "each episode, then over episodes. constant: sum of an episode divided by "
        "aggregation_length, then over episodes",
    )
    aggregation_length: int | None = Field(
        default=None,
        gt=0,
        description="divisor of aggregation='constant', tokens; usually the longest possible episode",
    )
    proximal: Literal["behavior", "learner"] = Field(
        default="behavior",
        description="policy in the denominator of the loss's importance ratio. behavior: logprobs recorded "
        "while sampling. learner: the learner's own logprobs before its first update on the "
        "batch; corrections then account for the difference to the sampling policy",
    )
    corrections: tuple[CorrectionSettings, ...] = Field(
        default=(), description="off-policy corrections; their weights multiply. The default is none"
    )
    kl: KlSettings | None = Field(
        default=None,
        description="penalty on the divergence from the initial policy (version 0)",
    )
    distill: DistillSettings | None = Field(
        default=None,
        description="on-policy distillation: a teacher's signal, added to the advantage of every sampled token. "
        "advantage.kind='none' learns from the teacher alone",
    )
    regularizers: tuple[OwnRegularizer, ...] = Field(
        default=(),
        description="regularizers of your own, whose penalties are added to the loss of every token",
    )
    entropy_bonus: float = Field(
        default=0.0,
        ge=0,
        description="coefficient of the mean token entropy, subtracted from the loss; 0: no bonus",
    )
    overlong: OverlongSettings | None = Field(
        default=None, description="reward penalty for long episodes (DAPO)"
    )
    constraints: Constraints = Field(
        default=(),
        description="limits on the mean of named costs, held by multipliers (Lagrangian learning). The default is none",
    )
    critic: AnyCritic | None = Field(
        default=None,
        description="value model, for advantages that need one (gae, turns)",
    )
    minibatches: int = Field(
        default=1,
        ge=1,
        description="optimizer steps per pass over the batch, each on an equal part of the episodes",
    )
    epochs: int = Field(default=1, ge=1, description="passes over the batch per learner step")
    skip_zero_advantage: bool = Field(
        default=True,
        description="leave sequences whose advantage is zero out of the forward pass. They still count in the "
        "denominators, so that the gradient is the same; metrics of tokens are over the others",
    )

    @model_validator(mode="before")
    @classmethod
    def _usual_kinds(cls, sections: Any) -> Any:
        """Give a section without a kind the default kind."""
        if not isinstance(sections, dict):
            return sections
        usual = {"advantage": {"kind": "grpo"}, "loss": {"kind": "ppo"}, "critic": {"kind": "own"}}
        said = {
            name: kind | sections[name]
            for name, kind in usual.items()
            if isinstance(sections.get(name), dict)
        }
        return sections | said

    @property
    def updates(self) -> int:
        """Optimizer steps of one learner step."""
        return self.minibatches * self.epochs

    def policy_steps(self, steps: int) -> int:
        """Optimizer steps of the policy in so many learner steps; the steps of the critic's warm-up have none."""
        waiting = 0 if self.critic is None else self.critic.warmup_steps
        return max(0, steps - waiting) * self.updates

    def critic_steps(self, steps: int) -> int:
        """Optimizer steps of the critic in so many learner steps."""
        return steps * ((self.critic and self.critic.updates) or self.updates)

    @property
    def keeps(self) -> bool:
        """Whether a learner step makes several optimizer steps, of which a later one may be refused."""
        return self.updates > 1 or isinstance(self.critic, TurnCriticSettings)

    @property
    def fixes_proximal(self) -> bool:
        """Whether the learner's own logprobs before the first of several optimizer steps are needed."""
        return self.proximal == "learner" and self.updates > 1

    @property
    def needs_reference(self) -> bool:
        """Whether the reference policy (version 0) is kept for its logprobs."""
        return self.kl is not None or any(part.reference for part in self.regularizers)

    @property
    def weighs_behavior(self) -> bool:
        """Whether a token's gradient depends on the behavior policy, by the loss's ratio or by a correction."""
        corrected = any(part.needs_ratio or isinstance(part, OwnCorrection) for part in self.corrections)
        return corrected or (self.proximal == "behavior" and self.loss.has_ratio)

    @model_validator(mode="after")
    def _loss_knows_how_far_it_is(self) -> AlgorithmSettings:
        if self.updates > 1 and not self.loss.has_ratio:
            raise ValueError(
                f"loss.kind={self.loss.kind!r} has no importance ratio: after the first of minibatches * epochs = "
                f"{self.updates} optimizer steps on a batch the batch is off-policy and its gradient biased; use 1 of "
                "each, or kind = 'cispo', which adds a ratio"
            )
        return self

    @model_validator(mode="after")
    def _critic_fits(self) -> AlgorithmSettings:
        if self.advantage.critic and self.critic is None:
            raise ValueError(
                f"advantage.kind={self.advantage.kind!r} needs a critic: add the section critic, or use an estimator "
                "without one (grpo, rloo, maxrl, reinforce_pp, returns, gigpo, gdpo, none)"
            )
        if self.critic is None:
            return self
        if self.advantage.critic is False:
            raise ValueError(
                f"advantage.kind={self.advantage.kind!r} uses no critic; remove the section critic, or use "
                "kind = 'gae'"
            )
        if isinstance(self.advantage, TurnAdvantage) != isinstance(self.critic, TurnCriticSettings):
            raise ValueError(
                f"advantage.kind={self.advantage.kind!r} and critic.kind={self.critic.kind!r} do not fit: a critic of "
                "turns gives the values of advantage.kind='turns', and of no other; use kind = 'turns' in both "
                "sections, or in neither"
            )
        return self

    @model_validator(mode="after")
    def _parts_fit(self) -> AlgorithmSettings:
        every_token = {
            "entropy_bonus": self.entropy_bonus > 0,
            "kl": self.kl and self.kl.where == "loss",
            "regularizers": self.regularizers,
            "critic.kind='shared'": isinstance(self.critic, SharedCriticSettings),
            "distill.divergence": self.distill and self.distill.divergence != "sampled",
        }
        for name, acts in every_token.items():
            if acts and self.skip_zero_advantage:
                raise ValueError(
                    f"{name} acts on every sampled token, but skip_zero_advantage=true leaves some out; set "
                    "skip_zero_advantage = false"
                )
        if self.aggregation == "constant" and self.aggregation_length is None:
            raise ValueError("aggregation='constant' divides by aggregation_length; set it, in tokens")
        idle = [part.kind for part in self.corrections if part.needs_ratio]
        if idle and self.proximal == "behavior":
            raise ValueError(
                f"corrections of kind {', '.join(map(repr, idle))} weigh a token by pi_proximal / pi_behavior, which "
                "is 1 with proximal='behavior'; set proximal = 'learner'"
            )
        if self.aggregation != "constant" and self.aggregation_length is not None:
            raise ValueError(
                f"aggregation={self.aggregation!r} does not use aggregation_length; remove it, or use 'constant'"
            )
        alone = isinstance(self.advantage, NoAdvantage)
        if alone and self.distill is None:
            raise ValueError(
                "advantage.kind='none' takes nothing from rewards, and there is no teacher to learn from; add the "
                "section distill, or use another estimator"
            )
        penalties = [name for name, part in (("overlong", self.overlong), ("kl", self.kl)) if part]
        if self.kl and self.kl.where == "loss":
            penalties.remove("kl")
        limited = [each.name for each in self.constraints]
        if twice := {name for name in limited if limited.count(name) > 1}:
            raise ValueError(f"two constraints limit the cost {twice.pop()!r}; remove one of them")
        if limited:
            penalties.append("constraints")
        if penalties and not self.advantage.shaped:
            reads = "reads no rewards" if alone else "reads named rewards alone"
            raise ValueError(
                f"advantage.kind={self.advantage.kind!r} {reads}, which {' and '.join(penalties)} cannot change; "
                "remove that section, or use another estimator"
            )
        return self
