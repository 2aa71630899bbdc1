"""The configuration of a run: the settings of each package side by side."""

from __future__ import annotations

import os
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from deploy.config.environments import (
    Environment,
    EnvSettings,
    NamedEnvSettings,
    RunSettings,
    environments_of,
)
from deploy.config.evaluation import EvaluationSettings
from deploy.config.guards import DEFAULTS, Guard
from deploy.config.policy_settings import PolicySettings
from deploy.config.supervise import SupervisionSettings
from deploy.config.trackers import OwnTracker
from envs.hosting.host import CustomResources
from learner.settings import LearnerSettings
from learner.stages.settings import AnyStage
from rollout.agents.agent import AgentSettings
from rollout.buffer.league import LeagueSettings
from rollout.buffer.replay_store import BufferSettings
from rollout.engines.engine import Sampling
from rollout.engines.settings import EngineSettings
from rollout.engines.vllm_start import VllmSettings
from rollout.episodes.worker import RolloutSettings
from rollout.wire.policies import NAME, POLICY

Word = Annotated[str, Field(pattern="^[a-z]+$")]


class Settings(BaseModel):
    """Base of the settings that belong to deployment itself."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class TinySettings(Settings):
    """A small random model and tokenizer, built at the start of the run without a download."""

    layers: int = Field(4, gt=0, description="transformer layers")
    width: int = Field(128, gt=0, description="hidden size")
    heads: int = Field(4, gt=0, description="attention heads")
    head_width: int = Field(
        32, gt=0, multiple_of=32, description="size of each head; vLLM on CPU supports multiples of 32"
    )
    mlp: int = Field(384, gt=0, description="hidden size of the feed-forward layers")
    tie: bool = Field(True, description="share the weights of input embedding and output head")
    pixels: int = Field(
        0,
        ge=0,
        multiple_of=8,
        description="width and height of the images that the model accepts, pixels; 0: text only",
    )
    words: tuple[Word, ...] = Field(
        (),
        description="lower-case words that the tokenizer encodes as one token each; all other text is encoded "
        "by characters",
    )
    environment_words: bool = Field(False, description="add all words that the environment uses to these")


class CheckpointSettings(Settings):
    """When the learner's state is written to disk."""

    every_steps: int = Field(
        10, gt=0, description="learner steps between two checkpoints; the last step always has one"
    )
    stage_steps: int = Field(
        500,
        gt=0,
        description="steps of a stage between two checkpoints; the end of a stage always has one",
    )
    keep: int = Field(2, gt=0, description="newest checkpoints that are kept")
    best_metric: str = Field(
        "",
        description="metric of the evaluations, such as eval_success or eval_pass@4, by which the best checkpoint is "
        "kept beside the newest; higher is better. Each evaluated version then has a checkpoint. Empty: none is kept",
    )


class ClusterSettings(Settings):
    """Connection to Ray, resources of the learner, and time limits."""

    address: str = Field(
        "", description="address of the Ray cluster to join; empty: start Ray on this machine"
    )
    learner_cpus: float = Field(
        1.0,
        ge=0,
        description="CPUs reserved per learner rank; fractions allowed. A rank that trains on a GPU reserves "
        "one GPU as well",
    )
    buffer_resources: dict[str, float] = Field(
        {},
        description="custom Ray resources that the replay buffer reserves, as in {storage_node = 0.01}: it is placed "
        "on a node that has them, and restored on another one that has them if that node is lost. Needs a copy "
        "(buffer.copy_to). Empty: the driver's node",
    )
    learner_resources: CustomResources = Field(
        {},
        description="custom Ray resources reserved per learner rank, as in {learner = 1}: it is placed only on a node "
        "that offers them",
    )
    colocate: Literal["turns"] | None = Field(
        None,
        description="turns: engines and the learner's ranks share GPUs, one of either on each, and have all of its "
        "memory in turns: engines sleep while the learner learns, whose state is in host memory while they play. Needs "
        "buffer.max_lag=0. Not set: they have GPUs of their own, or parts of one (weights.transfer='ipc')",
    )
    dashboard_port: int = Field(
        0, ge=0, le=65535, description="port of the dashboard of a local Ray; 0: no dashboard"
    )
    start_timeout_seconds: float = Field(
        300.0,
        gt=0,
        description="time limit for engines and learner to start, and for a checkpoint, seconds. The bytes of the "
        "model add to it (docs/engines.md)",
    )
    step_timeout_seconds: float = Field(
        600.0,
        gt=0,
        description="time limit for the groups of a step to arrive, seconds; the learner step itself has the "
        "same limit again",
    )
    fetch_timeout_seconds: float = Field(
        3600.0,
        gt=0,
        description="time limit for the nodes of a cluster to fetch the model before anything starts, seconds. "
        "Raise it for a large model over a slow network",
    )
    capacity_timeout_seconds: float = Field(
        30.0, gt=0, description="time to wait for missing cluster resources, seconds; then the run is refused"
    )

    @property
    def joins(self) -> bool:
        """Whether an existing cluster is joined, named here or by the Ray job that this process belongs to."""
        return bool(self.address) or "RAY_ADDRESS" in os.environ


class WeightSyncSettings(Settings):
    """Transfer of new weights to engines."""

    transfer: Literal["object_store", "nccl", "ipc"] = Field(
        "object_store",
        description="how weights reach the engines. object_store: through Ray's shared memory, on any "
        "hardware. nccl and ipc: between GPUs, to workers that serve a version already; the first version of a worker "
        "comes through the object store, and so does one whose transfer has failed",
    )
    delta: bool = Field(
        True,
        description="send workers on other nodes than the learner only the words that a step has changed, where those "
        "are fewer bytes; the workers of such a node hold one copy of the version in its memory. Engines load the same "
        "bytes",
    )
    sync_timeout_seconds: float = Field(
        120.0,
        gt=0,
        description="time limit for one engine to load one version, seconds. The bytes of the version add to it",
    )


class RunConfig(Settings):
    """The whole configuration of a run. Stored with the run as config.json."""

    name: str = Field("run", description="name of the run; its folder is NAME-DATE-TIME")
    seed: int = Field(
        0, ge=0, description="seed of everything random: tasks, sampling, initialization, shuffling"
    )
    policy: str = Field(
        POLICY,
        pattern=NAME,
        description="name of the policy that the run trains, in rows, ledger and manifests",
    )
    steps: int = Field(
        ge=0, description="learner steps; each makes one weight version. 0: the run ends behind its stages"
    )
    replay: str | None = Field(
        None,
        description="folder of a finished run whose trajectories are trained on; nothing is played then. "
        "`manta train --replay` sets it",
    )
    tiny: TinySettings | None = Field(
        None,
        description="build a small random model and tokenizer instead of loading learner.model.path; for "
        "tests and demonstrations",
    )
    env: EnvSettings | None = Field(
        None, description="environment that is trained on; a run has this section or the list envs"
    )
    agent: AgentSettings = Field(
        default_factory=AgentSettings, description="how the policy plays the environment"
    )
    sampling: Sampling = Field(default_factory=Sampling, description="how a turn is sampled")
    rollout: RolloutSettings = Field(
        default_factory=RolloutSettings, description="rollout workers, and the episodes that they play"
    )
    engine: EngineSettings = Field(
        default_factory=VllmSettings, description="inference engine of the rollout workers"
    )
    buffer: BufferSettings = Field(
        default_factory=BufferSettings, description="replay buffer: batch size, staleness and disk space"
    )
    learner: LearnerSettings = Field(
        default_factory=LearnerSettings, description="model, optimizer and algorithm"
    )
    stages: tuple[AnyStage, ...] = Field(
        (),
        description="what the learner does before reinforcement learning, in this order; none: nothing",
    )
    weights: WeightSyncSettings = Field(
        default_factory=WeightSyncSettings, description="transfer of new weights to the engines"
    )
    evaluation: EvaluationSettings = Field(
        default_factory=EvaluationSettings, description="evaluation before, during and after training"
    )
    checkpoint: CheckpointSettings = Field(
        default_factory=CheckpointSettings, description="checkpoints of the learner"
    )
    cluster: ClusterSettings = Field(
        default_factory=ClusterSettings, description="connection to Ray, reserved resources, and time limits"
    )
    supervision: SupervisionSettings = Field(
        default_factory=SupervisionSettings, description="detection and replacement of lost parts"
    )
    trackers: tuple[OwnTracker, ...] = Field(
        (), description='metric trackers of your own, "module:Class", beside metrics.jsonl and TensorBoard'
    )
    guards: tuple[Guard, ...] = Field(
        DEFAULTS,
        description="bounds on metrics; a guard warns or stops the run when its metric is out of bounds. A "
        "guard here replaces the default for its metric",
    )
    policies: dict[Annotated[str, Field(pattern=NAME)], PolicySettings] = Field(
        default_factory=dict,
        description="policies that learn at once, by their names; none: the run trains one policy",
    )
    league: LeagueSettings | None = Field(
        None,
        description="past versions of the run's policies as opponents in games; not set: policies do not meet",
    )
    envs: tuple[NamedEnvSettings, ...] = Field(
        (), description="environments that are trained on at once, in place of env; each group plays one"
    )

    @property
    def environments(self) -> tuple[Environment, ...]:
        """The environments of the run, in the recipe's order: that of `env`, or those of `envs`."""
        limits, options = self.rollout.limits, self.evaluation.options
        return environments_of(self.env, self.envs, RunSettings(self.agent, self.sampling, limits, options))

    @property
    def workers(self) -> int:
        """The rollout workers that the run starts: none where it makes stages only, and evaluates nothing."""
        return self.rollout.workers if self.steps or self.evaluation.evaluates else 0
