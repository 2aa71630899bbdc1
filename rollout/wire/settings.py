"""Settings of the buffer."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class BufferSettings(BaseModel):
    """How many groups a step takes, how old they may be, and what of the disk they may use."""

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
