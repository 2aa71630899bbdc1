"""The settings of one of several policies, `[policies.NAME]`."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class PolicySettings(BaseModel):
    """One of several policies that learn in a run: its share, its opponents, and options that differ from the run's."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    share: float = Field(
        1.0,
        gt=0,
        allow_inf_nan=False,
        description="share of a step's groups (buffer.groups_per_step) and of a worker's concurrent groups that belong "
        "to this policy, relative to the shares of the others",
    )
    opponents: tuple[str, ...] | None = Field(
        None,
        description="policies that play the other seat of its games; its own name is itself. Not set: all others",
    )
    env: dict[str, Any] = Field(default_factory=dict, description="options of env that differ from the run's")
    agent: dict[str, Any] = Field(
        default_factory=dict, description="options of agent that differ from the run's"
    )
    sampling: dict[str, Any] = Field(
        default_factory=dict, description="options of sampling that differ from the run's"
    )
    tiny: dict[str, Any] = Field(
        default_factory=dict, description="options of tiny that differ from the run's"
    )
    learner: dict[str, Any] = Field(
        default_factory=dict,
        description="options of learner that differ from the run's. With a model.path the policy has no tiny model",
    )
    buffer: dict[str, Any] = Field(
        default_factory=dict,
        description="options of buffer that differ from the run's; groups_per_step here replaces the share",
    )
    rollout: dict[str, Any] = Field(
        default_factory=dict, description="options of rollout that differ from the run's"
    )
    evaluation: dict[str, Any] = Field(
        default_factory=dict, description="options of evaluation that differ from the run's"
    )
    stages: tuple[dict[str, Any], ...] | None = Field(
        None, description="the policy's stages, in the place of the run's; not set: those of the run"
    )

    @property
    def changes(self) -> dict[str, dict[str, Any]]:
        """The options that differ from the run's, by section."""
        sections = {
            "env": self.env,
            "agent": self.agent,
            "sampling": self.sampling,
            "tiny": self.tiny,
            "learner": self.learner,
            "buffer": self.buffer,
            "rollout": self.rollout,
            "evaluation": self.evaluation,
        }
        return {name: options for name, options in sections.items() if options}
