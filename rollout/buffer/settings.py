"""Settings of the replay buffer."""

from __future__ import annotations

from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from rollout.buffer.samplers import AnySampler, Fifo


class ReuseSettings(BaseModel):
    """Reuse of groups that earlier steps were trained on."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    groups: int = Field(0, ge=0, description="groups of earlier steps in a step, beside its own; 0: none")
    limit: int = Field(1, ge=1, description="how often a group may be reused in all")
    max_lag: int = Field(4, ge=1, description="weight versions a reused group may be behind when trained")
    sampler: AnySampler = Field(Fifo(), description="which of the groups that may be reused are")


class BufferSettings(BaseModel):
    """Groups per step, their staleness bound, and their disk space."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    groups_per_step: int = Field(32, gt=0, description="groups of one learner step")
    max_lag: int = Field(
        1, ge=0, description="weight versions a group may be behind when trained; 0: synchronous"
    )
    segment_mib: int = Field(
        64, gt=0, description="size at which a segment file of stored rows is closed, MiB"
    )
    max_failed_share: float = Field(
        0.2,
        ge=0,
        le=1,
        description="share of the last 200 episodes that infrastructure may fail before the run stops",
    )
    disk_gib: float | None = Field(
        None,
        gt=0,
        description="GiB of stored groups beyond which the oldest trained ones are removed; none: keep everything",
    )
    min_free_mib: int = Field(
        512, ge=0, description="MiB that must be free on the run's disk; with less, the run waits"
    )
    reuse: ReuseSettings = Field(ReuseSettings(), description="training on groups of earlier steps again")

    @model_validator(mode="after")
    def _reuse_finds_groups(self) -> Self:
        reuse = self.reuse
        if reuse.groups and reuse.max_lag <= self.max_lag:
            raise ValueError(
                f"buffer.reuse.max_lag={reuse.max_lag} leaves nothing to reuse: with buffer.max_lag={self.max_lag} a "
                f"group may be as old when it is first trained, and is older at the next step; use {self.max_lag + 1} "
                "or more"
            )
        most = self.groups_per_step * min(reuse.limit, reuse.max_lag)
        if reuse.groups > most:
            raise ValueError(
                f"buffer.reuse.groups={reuse.groups} can never be found: a step brings "
                f"buffer.groups_per_step={self.groups_per_step} groups, each reused buffer.reuse.limit={reuse.limit} "
                f"times within buffer.reuse.max_lag={reuse.max_lag} steps; use {most} or fewer"
            )
        return self
