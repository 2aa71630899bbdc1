"""The stages a recipe can list: what a run does with its learner before reinforcement learning, in the recipe's order.

[[stages]]
kind = "sft"                                       # or a class of your own, as "module:name"
source = { kind = "player", episodes = 512 }       # what it learns from
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, Field, field_validator, model_validator

from learner.algorithm.preferences import AnyPreferenceLoss, DpoLoss
from learner.algorithm.schedule import OptimSettings
from rollout.wire.own_part import BUILT_IN, BY_KIND, OWN, OwnPart, OwnPartRefused


class PlayerSource(BaseModel, extra="forbid", frozen=True):
    """Demonstrations of the environment's scripted player, played before the stage begins."""

    kind: Literal["player"] = "player"
    episodes: int = Field(default=4096, gt=0, description="demonstrations played")
    error_rate: float = Field(
        default=0.5, ge=0, le=1, description="share of the player's moves that are random"
    )
    min_reward: float | None = Field(
        default=None, description="only demonstrations whose total reward reaches this; none: all"
    )


class RunSource(BaseModel, extra="forbid", frozen=True):
    """Episodes that a finished run has trained on, each once, in the order of its steps."""

    kind: Literal["run"] = "run"
    path: str = Field(min_length=1, description="folder of the run, whose tokenizer must be this run's")
    episodes: int | None = Field(
        default=None, gt=0, description="at most so many episodes, the first ones; none: all"
    )
    min_reward: float | None = Field(
        default=None, description="only episodes whose total reward reaches this; none: all"
    )
    keep: Literal["all", "best_of_group"] = Field(
        default="all",
        description="which episodes of a group. all: every one. best_of_group: the one of the most reward, of equal "
        "ones the first, as in rejection sampling",
    )

    @field_validator("path")
    @classmethod
    def _from_anywhere(cls, path: str) -> str:
        """A stored run finds it from wherever it is resumed."""
        return str(Path(path).absolute())


class DatasetSource(BaseModel, extra="forbid", frozen=True):
    """Recorded conversations of a data file: their assistant's turns, or a better and a worse answer of each."""

    kind: Literal["dataset"] = "dataset"
    path: str = Field(
        min_length=1, description='file, folder or "owner/name" of the hub, as of the environment dataset'
    )
    episodes: int | None = Field(
        default=None, gt=0, description="at most so many rows, the first ones; none: all"
    )
    system: str | None = Field(
        default=None, description="system message, said first unless a row has one of its own; none: nothing"
    )

    @field_validator("path")
    @classmethod
    def _from_anywhere(cls, path: str) -> str:
        """A stored run finds a file from wherever it is resumed."""
        return str(Path(path).absolute()) if Path(path).exists() else path


AnySource = Annotated[PlayerSource | RunSource | DatasetSource, Field(discriminator="kind")]


class StageSettings(BaseModel, frozen=True):
    """What every stage has."""

    source: AnySource = Field(default=PlayerSource(), description="what the stage learns from")
    threads: int = Field(
        default=0,
        ge=0,
        description="CPU threads of torch during the stage, in which nothing is sampled; 0: as learner.threads",
    )

    @model_validator(mode="before")
    @classmethod
    def _usual_source(cls, section: Any) -> Any:
        """A source that names no kind is the player."""
        source = section.get("source") if isinstance(section, dict) else None
        return section | {"source": {"kind": "player"} | source} if isinstance(source, dict) else section

    @property
    def planned(self) -> tuple[OptimSettings, int] | None:
        """The stage's optimizer and the most steps it can make, where the settings tell."""
        return None


class EpisodeSettings(StageSettings, frozen=True):
    """What stages have whose every step is one on so many episodes."""

    optim: OptimSettings = Field(
        default=OptimSettings(learning_rate=1e-5), description="the stage's own optimizer of the policy"
    )
    epochs: int = Field(default=1, ge=1, description="passes over the episodes")
    episodes_per_step: int = Field(default=32, ge=1, description="episodes in one optimizer step")

    def steps(self, episodes: int) -> int:
        """How many optimizer steps that many episodes make."""
        return self.epochs * -(-episodes // self.episodes_per_step)

    @property
    def planned(self) -> tuple[OptimSettings, int] | None:
        episodes = self.source.episodes
        return None if episodes is None else (self.optim, self.steps(episodes))


class PairSettings(StageSettings, frozen=True):
    """What stages have whose every step is one on so many pairs of episodes."""

    epochs: int = Field(default=1, ge=1, description="passes over the pairs")
    pairs_per_step: int = Field(default=32, ge=1, description="pairs in one optimizer step")

    @model_validator(mode="after")
    def _pairs_remain(self) -> PairSettings:
        if isinstance(self.source, RunSource) and self.source.keep == "best_of_group":
            raise ValueError(
                "source.keep='best_of_group' leaves one episode of a group, which makes no pair; use keep='all'"
            )
        return self

    def steps(self, pairs: int) -> int:
        """How many optimizer steps that many pairs make."""
        return self.epochs * -(-pairs // self.pairs_per_step)


class SftSettings(EpisodeSettings, extra="forbid", frozen=True):
    """Supervised fine-tuning: raise the likelihood of the actions in recorded episodes."""

    kind: Literal["sft"] = "sft"


class IlqlSettings(EpisodeSettings, extra="forbid", frozen=True):
    """Implicit Q-learning: values of tokens from recorded episodes and their rewards, and the policy that they make."""

    kind: Literal["ilql"] = "ilql"
    value_optim: OptimSettings = Field(
        default=OptimSettings(learning_rate=1e-4), description="optimizer of the value heads"
    )
    head_width: int = Field(
        default=0,
        ge=0,
        description="width of a head's hidden layer; 0: twice that of the policy's hidden states",
    )
    gamma: float = Field(default=0.99, gt=0, le=1, description="discount factor per turn")
    expectile: float = Field(
        default=0.8,
        ge=0.5,
        lt=1,
        description="of the action values in the data, which the state value aims at; 0.5: their mean, near 1: their "
        "maximum",
    )
    cql: float = Field(
        default=0.1,
        ge=0,
        description="factor of the conservative loss, which lowers the values of tokens that the data does not hold",
    )
    target_rate: float = Field(
        default=0.005,
        gt=0,
        le=1,
        description="share of the way that the slow copy of the action values goes towards them in a step",
    )
    value_coefficient: float = Field(
        default=1.0, ge=0, description="factor of the value losses against the policy's"
    )
    detach: bool = Field(
        default=False, description="keep the value losses' gradient out of the policy's trunk"
    )
    temperature: float = Field(
        default=0.1,
        gt=0,
        description="of the policy's weights exp(advantage / temperature), in units of the reward; smaller: greedier",
    )
    weight_limit: float = Field(default=20.0, ge=1, description="largest of these weights")
    warmup_steps: int = Field(
        default=0,
        ge=0,
        description="first steps, in which values are learned and the policy imitates all tokens alike: weights of "
        "values that are not yet learned teach noise",
    )

    def head_parameters(self, width: int, vocabulary: int) -> tuple[int, int]:
        """Parameters of the two action values and of the state value, on hidden states of this width."""
        hidden = self.hidden_width(width)
        actions, state = ((width + 1) * hidden + (hidden + 1) * out for out in (vocabulary, 1))
        return 2 * actions, state

    def hidden_width(self, width: int) -> int:
        """Width of a head's hidden layer on hidden states of this width."""
        return self.head_width or 2 * width


class PreferenceSettings(PairSettings, extra="forbid", frozen=True):
    """Preference optimization: raise the better episode of a group against the worse."""

    kind: Literal["preference"] = "preference"
    loss: AnyPreferenceLoss = Field(default=DpoLoss(), description="loss of a pair")
    optim: OptimSettings = Field(
        default=OptimSettings(learning_rate=1e-6), description="the stage's own optimizer"
    )


class KtoSettings(EpisodeSettings, extra="forbid", frozen=True):
    """Kahneman-Tversky optimization: raise answers that were found good and lower bad ones, without pairs."""

    kind: Literal["kto"] = "kto"
    optim: OptimSettings = Field(
        default=OptimSettings(learning_rate=1e-6), description="the stage's own optimizer"
    )
    beta: float = Field(
        default=0.1,
        gt=0,
        description="how strongly the policy is held to the reference; smaller lets it go further",
    )
    desirable_from: float = Field(
        default=0.5, description="episodes whose total reward reaches this are good, all others bad"
    )
    desirable_weight: float = Field(
        default=1.0,
        gt=0,
        description="weight of a good episode. Where one label is rarer, raise its weight: the weights times the "
        "numbers of good and of bad episodes should be within a factor of 4/3",
    )
    undesirable_weight: float = Field(default=1.0, gt=0, description="weight of a bad episode")


class RewardModelSettings(PairSettings, extra="forbid", frozen=True):
    """A reward model: one number a conversation, larger for the better one of a pair. It takes the policy's place."""

    kind: Literal["reward_model"] = "reward_model"
    optim: OptimSettings = Field(
        default=OptimSettings(learning_rate=1e-5), description="optimizer of the model"
    )
    head_optim: OptimSettings = Field(
        default=OptimSettings(learning_rate=1e-3), description="optimizer of the head, which begins as zeros"
    )
    margin: float = Field(
        default=0.0,
        ge=0,
        description="factor of the difference of a pair's rewards (the column `margin` of a data file), by which the "
        "better one is to be worth more; 0: no margin",
    )
    centre: float = Field(
        default=0.0,
        ge=0,
        description="factor of the squared sum of a pair's rewards, which keeps them around 0",
    )
    heldout_share: float = Field(
        default=0.1,
        ge=0,
        lt=1,
        description="share of the prompts whose pairs are not learned, but judged after every epoch",
    )


class OwnStage(StageSettings, OwnPart):
    """A stage of a user's own: a class whose instances have `begin` and `advance`, see learner/stages/stage.py."""

    METHODS: ClassVar[dict[str, tuple[str, ...]]] = {"begin": ("learner", "groups"), "advance": ("step",)}

    def try_out(self, critic: bool) -> None:
        made = self.call()
        for name, arguments in self.METHODS.items():
            said = f"{name}({', '.join(arguments)})"
            method = getattr(made, name, None)
            if not callable(method):
                raise OwnPartRefused(f"{self.kind} makes {type(made).__name__}, which has no method {said}")
            try:
                inspect.signature(method).bind(*arguments)
            except TypeError as error:
                raise OwnPartRefused(f"{self.kind} is asked {said}: {error}") from None


def _sft_unless_said(section: Any) -> Any:
    return {"kind": "sft"} | section if isinstance(section, dict) else section


BuiltInStage = Annotated[
    SftSettings | PreferenceSettings | KtoSettings | RewardModelSettings | IlqlSettings,
    Field(discriminator="kind"),
    BeforeValidator(_sft_unless_said),
]
AnyStage = Annotated[Annotated[BuiltInStage, BUILT_IN] | Annotated[OwnStage, OWN], BY_KIND]
