"""The environments of a run: `[env]`, or several with shares in `[[envs]]`.

Everything else sees `RunConfig.environments`, where `[env]` is one entry, and options that an entry leaves out
are those of the run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from envs.hosting.host import HostSettings
from rollout.agents.agent import AgentSettings
from rollout.engines.engine import Sampling
from rollout.episodes.episode import EpisodeLimits
from rollout.episodes.reward import OwnReward
from rollout.wire.trajectory import EnvironmentKey, Task


class EnvSettings(BaseModel):
    """The training environment."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str = Field(
        description="environment: the name of one that ships with Manta (`manta envs` lists them), any "
        'gymnasium.make id, "module:Class" of your own, or "program" for an external agent'
    )
    options: dict[str, Any] = Field(default_factory=dict, description="keyword arguments of the environment")
    shuffle: bool = Field(
        True,
        description="whether an environment with a list of tasks, such as dataset, plays it in another order in each "
        "pass; false: in the order of the list",
    )
    host: HostSettings = Field(
        default_factory=HostSettings, description="where environment replicas run, and their time limits"
    )
    reward: OwnReward | None = Field(
        None,
        description='reward function of your own for whole episodes, "module:function"; without it the '
        "environment's reward counts",
    )


class NamedEnvSettings(EnvSettings):
    """One of the environments of a run with several."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$",
        description="name of the environment in metrics, evaluations and the report",
    )
    share: float = Field(
        1.0,
        gt=0,
        allow_inf_nan=False,
        description="share of the groups that play this environment, relative to the shares of the others: 2 beside "
        "1 is two groups in three",
    )
    agent: AgentSettings | None = Field(
        None, description="how the policy plays this environment; not set: by the section agent"
    )
    max_turns: int | None = Field(
        None, gt=0, description="turns after which an episode is truncated; not set: rollout.max_turns"
    )
    max_tokens: int | None = Field(
        None, gt=0, description="most tokens that are sampled in a turn; not set: sampling.max_tokens"
    )
    episode_seconds: float | None = Field(
        None, gt=0, description="time limit for an episode, seconds; not set: rollout.episode_seconds"
    )
    evaluation_options: dict[str, Any] | None = Field(
        None,
        description="options that differ from those of training in an evaluation; not set: evaluation.options",
    )


@dataclass(frozen=True, slots=True)
class Environment:
    """An environment of a run, with everything that holds for its episodes."""

    section: str  # of the recipe: "env", "envs.0"
    name: str
    share: float
    settings: EnvSettings
    evaluation_section: str
    evaluation_options: dict[str, Any]  # that differ from those of training
    agent_section: str
    agent: AgentSettings
    sampling: Sampling
    limits: EpisodeLimits

    @property
    def id(self) -> str:
        return self.settings.id

    @property
    def options(self) -> dict[str, Any]:
        """Options in training."""
        return self.settings.options

    @property
    def evaluated(self) -> dict[str, Any]:
        """Options in evaluations."""
        return self.settings.options | self.evaluation_options

    @property
    def shuffle(self) -> bool:
        return self.settings.shuffle

    @property
    def host(self) -> HostSettings:
        return self.settings.host

    @property
    def reward(self) -> OwnReward | None:
        return self.settings.reward

    @property
    def keys(self) -> set[EnvironmentKey]:
        """What the tasks of its training and of its evaluations have in common."""
        return {Task.of(self.id, 0, options).environment for options in (self.options, self.evaluated)}


class RunSettings(NamedTuple):
    """What holds for an environment whose entry has no settings of its own."""

    agent: AgentSettings
    sampling: Sampling
    limits: EpisodeLimits
    evaluation_options: dict[str, Any]


def environments_of(
    env: EnvSettings | None, envs: Sequence[NamedEnvSettings], usual: RunSettings
) -> tuple[Environment, ...]:
    """The environments of a run, in the order of the recipe. `[env]` is one, named after its id."""
    if env is not None:
        only = NamedEnvSettings.model_construct(name=env.id, **dict(env))
        return (_environment("env", only, usual),)
    return tuple(_environment(f"envs.{place}", each, usual) for place, each in enumerate(envs))


def _environment(section: str, settings: NamedEnvSettings, usual: RunSettings) -> Environment:
    """An entry, with the run's settings where it has none of its own."""
    limits, sampling = usual.limits, usual.sampling
    if settings.max_tokens is not None:
        sampling = sampling.model_copy(update={"max_tokens": settings.max_tokens})
    own_evaluation, own_agent = settings.evaluation_options, settings.agent
    return Environment(
        section=section,
        name=settings.name,
        share=settings.share,
        settings=settings,
        evaluation_section="evaluation.options"
        if own_evaluation is None
        else f"{section}.evaluation_options",
        evaluation_options=usual.evaluation_options if own_evaluation is None else own_evaluation,
        agent_section="agent" if own_agent is None else f"{section}.agent",
        agent=own_agent or usual.agent,
        sampling=sampling,
        limits=EpisodeLimits(
            settings.max_turns or limits.max_turns, settings.episode_seconds or limits.timeout_seconds
        ),
    )


def environment_names(environments: Sequence[Environment]) -> dict[EnvironmentKey, str]:
    """Names of several environments by what their tasks have in common; none of a single one."""
    return {key: each.name for each in environments for key in each.keys} if len(environments) > 1 else {}


def environment_named(environments: Sequence[Environment], name: str) -> Environment | None:
    """The environment with this name, else the first with this id; None if there is neither."""
    found = [each for each in environments if each.name == name]
    found += [each for each in environments if each.id == name]
    return found[0] if found else None
