"""What the learner optimizes, as settings."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field, model_validator


class AlgorithmSettings(BaseModel, extra="forbid", frozen=True):
    """Group-relative policy optimization: PPO's clipped surrogate with a truncated importance weight."""

    clip_low: float = Field(default=0.2, gt=0, lt=1, description="the ratio is clipped below at 1 - clip_low")
    clip_high: float = Field(default=0.28, gt=0, description="the ratio is clipped above at 1 + clip_high")
    tis_cap: float = Field(
        default=2.0, gt=0, description="upper bound of the importance weight proximal / behavior"
    )
    proximal: Literal["behavior", "learner"] = Field(
        default="behavior",
        description="what the clipped ratio is taken against: the logprobs recorded while sampling, or the "
        "learner's own before its first update on the batch (the importance weight then corrects the rest)",
    )
    minibatches: int = Field(default=1, ge=1, description="optimizer steps one batch of groups is split into")
    entropy_bonus: float = Field(
        default=0.0, ge=0, description="weight of the mean token entropy added to the objective"
    )
    advantage_eps: float = Field(
        default=1e-6, ge=0, description="added to a group's reward standard deviation"
    )
    skip_zero_advantage: bool = Field(
        default=True,
        description="leave sequences without any advantage out of the forward pass; they still count",
    )

    @model_validator(mode="after")
    def _bonus_reaches_every_token(self) -> AlgorithmSettings:
        if self.entropy_bonus > 0 and self.skip_zero_advantage:
            raise ValueError(
                "entropy_bonus acts on every sampled token: set skip_zero_advantage = false with it"
            )
        return self
