"""Settings of the replay buffer."""

from __future__ import annotations

from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from rollout.buffer.curriculum import CurriculumSettings
from rollout.buffer.samplers import AnySampler, Fifo


class ReuseSettings(BaseModel):
    """Reuse of groups that earlier steps were trained on."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    groups: int = Field(
        0,
        ge=0,
        description="groups of earlier steps added to each learner step, beside its own groups; 0: no reuse",
    )
    limit: int = Field(1, ge=1, description="most times that a group is reused")
    max_lag: int = Field(
        4, ge=1, description="staleness bound of a reused group, weight versions; above buffer.max_lag"
    )
    sampler: AnySampler = Field(
        Fifo(), description="how reused groups are chosen among those within the bounds"
    )


class BufferSettings(BaseModel):
    """Groups per step, their staleness bound, and their disk space."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    groups_per_step: int = Field(
        32,
        gt=0,
        description="groups that a learner step trains on; times rollout.group_size it is the batch size in "
        "episodes",
    )
    max_lag: int = Field(
        1,
        ge=0,
        description="staleness bound: how many weight versions behind the learner a trained group may be. 0 "
        "is synchronous training; larger values keep the engines busy while the learner works",
    )
    segment_mib: int = Field(
        64, gt=0, description="size of a file of stored rows, MiB, beyond which the next file begins"
    )
    max_failed_share: float = Field(
        0.2,
        ge=0,
        le=1,
        description="fraction of the last 200 episodes that may fail for reasons of infrastructure; beyond it "
        "the run stops",
    )
    disk_gib: float | None = Field(
        None,
        gt=0,
        description="bound on the stored groups, GiB; beyond it the oldest trained groups are deleted. Not "
        "set: keep all",
    )
    min_free_mib: int = Field(
        512,
        ge=0,
        description="free space that the run's disk must have, MiB; below it the run pauses until there is "
        "room",
    )
    copy_to: str = Field(
        "auto",
        min_length=1,
        description="shared storage for a copy of ledger, journal and rows, which then lie on a local disk. auto: the "
        "run folder, if its file system cannot hold a ledger (NFS and other network file systems), else no copy. run: "
        "the run folder in any case. Otherwise a folder or an fsspec URL, such as s3://bucket/run, of this run alone",
    )
    local_dir: str = Field(
        "",
        description="folder on a local disk for the state of a run with a copy; empty: the system's temporary folder",
    )
    reuse: ReuseSettings = Field(
        ReuseSettings(), description="training on groups of earlier steps again; the default is no reuse"
    )
    curriculum: CurriculumSettings = Field(
        CurriculumSettings(), description="tasks that are played again; the default plays the next one"
    )

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
