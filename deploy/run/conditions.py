"""Under what an agent is evaluated outside of a run."""

from __future__ import annotations

from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from envs.hosting.host import HostSettings
from rollout.agents.agent import AgentSettings
from rollout.engines.engine import Sampling
from rollout.engines.settings import EngineSettings
from rollout.engines.vllm_start import VllmSettings
from rollout.episodes.evaluation import Majority, require_differing
from rollout.episodes.reward import OwnReward


class Conditions(BaseModel):
    """Environment, agent, sampling, limits and engine of an evaluation."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    env_options: dict[str, Any] = {}
    agent: AgentSettings = AgentSettings()
    sampling: Sampling = Sampling(max_tokens=64)
    context_tokens: int = 2048
    max_turns: int = 100
    episode_seconds: float = 600.0
    host: HostSettings = HostSettings()
    engine: EngineSettings = VllmSettings(dtype="float32")
    reward: OwnReward | None = None
    on_gpu: bool = False
    trust_remote_code: bool = False  # code that comes with the model may be executed
    seed: int = Field(0, ge=0, description="seed of all sampling; the same seed samples the same tokens")
    samples: int = Field(1, gt=0, description="episodes of each task")
    majority: Majority = "none"

    @model_validator(mode="after")
    def _samples_differ(self) -> Self:
        require_differing(self.samples, self.sampling.temperature)
        return self
