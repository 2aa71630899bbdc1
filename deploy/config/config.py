"""A run's configuration: each package's own settings side by side."""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from deploy.config.guards import DEFAULTS, Guard
from deploy.config.supervise import SupervisionSettings
from deploy.config.trackers import OwnTracker
from envs.hosting.host import HostSettings
from learner.settings import LearnerSettings
from rollout.agents.agent import AgentSettings
from rollout.buffer.replay_store import BufferSettings
from rollout.engines.engine import Sampling
from rollout.engines.settings import EngineSettings
from rollout.engines.vllm_start import VllmSettings
from rollout.episodes.reward import OwnReward
from rollout.episodes.worker import RolloutSettings

Word = Annotated[str, Field(pattern="^[a-z]+$")]


class Settings(BaseModel):
    """Base of the settings that belong to deployment itself."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class TinySettings(Settings):
    """A small random model and tokenizer, built where the run starts: nothing is downloaded."""

    layers: int = Field(4, gt=0)
    width: int = Field(128, gt=0, description="hidden size")
    heads: int = Field(4, gt=0)
    head_width: int = Field(
        32, gt=0, multiple_of=32, description="of each head; vLLM on CPUs wants multiples of 32"
    )
    mlp: int = Field(384, gt=0, description="width of the feed-forward layers")
    tie: bool = Field(True, description="share input and output embeddings")
    pixels: int = Field(
        0, ge=0, multiple_of=8, description="wide and high: a model that sees such pictures; 0: text alone"
    )
    words: tuple[Word, ...] = Field((), description="lower-case words that are one token each")
    environment_words: bool = Field(False, description="besides them all that the environment says")


class EnvSettings(Settings):
    """The environment trained on."""

    id: str = Field(
        description='one of ours, "program" (a foreign agent), or any gymnasium.make id (see manta envs)'
    )
    options: dict[str, Any] = Field(default_factory=dict, description="keyword arguments of the environment")
    host: HostSettings = Field(default_factory=HostSettings, description="where its replicas live")
    reward: OwnReward | None = Field(
        None, description="your own reward of a whole episode, as 'module:function'; none: the environment's"
    )


class EvaluationSettings(Settings):
    """How success is measured before and after."""

    tasks: int = Field(
        256, ge=0, description="tasks; their first observations differ where there is a split; 0: none"
    )
    seconds: float = Field(1800.0, gt=0, description="limit for one evaluation")
    first_seed: int = Field(0, ge=0, description="seeds are tried from here on")
    options: dict[str, Any] = Field(
        default_factory=dict, description="environment options that differ from training"
    )


class WarmStartSettings(Settings):
    """Imitation of a scripted player before reinforcement learning."""

    episodes: int = Field(4096, gt=0, description="demonstrations played")
    error_rate: float = Field(0.5, ge=0, le=1, description="share of the player's moves that are random")


class CheckpointSettings(Settings):
    """When the learner's state lands on disk."""

    every_steps: int = Field(10, gt=0)
    keep: int = Field(2, gt=0, description="checkpoints kept, the newest")


class ClusterSettings(Settings):
    """How Ray is reached and how long anything may take."""

    address: str = Field("", description="Ray cluster to join; empty: start a local one")
    learner_cpus: float = Field(
        1.0,
        ge=0,
        description="CPUs that each rank of the learner claims; it claims a GPU where it trains on one",
    )
    dashboard_port: int = Field(
        0, ge=0, le=65535, description="port of a local Ray's dashboard; 0: no dashboard"
    )
    start_seconds: float = Field(300.0, gt=0, description="limit for starting engines and the learner")
    step_seconds: float = Field(
        600.0,
        gt=0,
        description="limit for a step's groups to come together, and as long again for the step itself",
    )
    capacity_seconds: float = Field(30.0, gt=0, description="how long to wait for missing cluster resources")

    @property
    def joins(self) -> bool:
        """Whether a cluster that is there is joined, named here or by the Ray job that runs us."""
        return bool(self.address) or "RAY_ADDRESS" in os.environ


class WeightSyncSettings(Settings):
    """How new weights travel."""

    transfer: Literal["object_store", "nccl", "ipc"] = Field(
        "object_store", description="nccl and ipc need GPUs"
    )
    sync_seconds: float = Field(120.0, gt=0, description="limit for one engine to load one version")


class RunConfig(Settings):
    """Everything a run does. Stored with the run as config.json."""

    name: str = Field("run", description="first part of the run folder's name")
    seed: int = Field(0, ge=0)
    steps: int = Field(gt=0, description="learner steps, each one weight version")
    replay: str | None = Field(
        None,
        description="folder of a finished run whose trajectories are learned from; nothing is played then",
    )
    tiny: TinySettings | None = Field(
        None, description="build a tiny model instead of loading learner.model.path"
    )
    env: EnvSettings
    agent: AgentSettings = Field(default_factory=AgentSettings)
    sampling: Sampling = Field(default_factory=Sampling)
    rollout: RolloutSettings = Field(default_factory=RolloutSettings)
    engine: EngineSettings = Field(default_factory=VllmSettings)
    buffer: BufferSettings = Field(default_factory=BufferSettings)
    learner: LearnerSettings = Field(default_factory=LearnerSettings)
    warm_start: WarmStartSettings | None = None
    weights: WeightSyncSettings = Field(default_factory=WeightSyncSettings)
    evaluation: EvaluationSettings = Field(default_factory=EvaluationSettings)
    checkpoint: CheckpointSettings = Field(default_factory=CheckpointSettings)
    cluster: ClusterSettings = Field(default_factory=ClusterSettings)
    supervision: SupervisionSettings = Field(default_factory=SupervisionSettings)
    trackers: tuple[OwnTracker, ...] = Field(
        (), description='your own metric trackers, each "module:Class", beside metrics.jsonl and TensorBoard'
    )
    guards: tuple[Guard, ...] = Field(DEFAULTS, description="bounds of metrics that warn or end the run")
