"""The real vLLM with a model that sees: what it samples before pictures is what the learner scores."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest
import torch

from deploy.assembly.build import load_chat, load_tokenizer
from learner.data.batch import row_of, sequences_of
from learner.model.policy import Policy
from learner.settings import ModelSettings
from learner.training.publish import take_snapshot
from rollout.agents.agent import Agent
from rollout.chat.perception import Perception
from rollout.engines.engine import Sampling
from rollout.engines.vllm_engine import VllmEngine
from rollout.engines.vllm_start import VllmSettings
from rollout.episodes.episode import EpisodeLimits, EpisodeSpec
from rollout.episodes.group import play
from rollout.episodes.pool import EnvironmentPool
from rollout.wire.schema import decode, encode
from rollout.wire.trajectory import Group, Slot, Task, Trajectory
from rollout.wire.weights import WeightUpdate, write_memory
from tests.rollout.chat.test_perception import Lenient
from tests.seeing import CONTEXT, build

pytest.importorskip("torchvision", reason="vLLM's models that see import it")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def test_an_episode_with_pictures_under_new_weights(tmp_path: Path) -> None:
    build("llava", tmp_path, head_width=32)
    path = str(tmp_path)
    policy = Policy(ModelSettings(path=path))
    with torch.no_grad():
        for position, parameter in enumerate(policy.parameters()):
            generator = torch.Generator().manual_seed(position)
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    settings = VllmSettings(dtype="float32", kv_cache_gib=0.25, max_num_seqs=8)
    stop = [load_tokenizer(path).eos_token_id]

    async def run() -> list[Trajectory]:
        perception = Perception.load(path)
        engine = await VllmEngine.start("rollout-0", path, stop, CONTEXT, settings, perception=perception)
        try:
            snapshot = take_snapshot(policy, 1, "float32")
            handle, alive = write_memory(snapshot.arrays)
            report = await engine.sync(WeightUpdate(snapshot.manifest, handle))
            assert report.probe_difference < 1e-4 and alive
            agent = Agent(engine, load_chat(path), Sampling(max_tokens=4), CONTEXT)
            pool = EnvironmentPool(make=lambda env_id, **options: Lenient(**options))
            slots = [Slot(0, 0, Task.of("patches", seed, {"level": 3}), 1) for seed in range(4)]
            places = [EpisodeSpec(slot, index, seed=index) for index, slot in enumerate(slots)]
            played = [play(place, pool, agent, EpisodeLimits(4, 600.0)) for place in places]
            return [
                decode(encode(Group(place.slot, (trajectory,)))).trajectories[0]
                for place, trajectory in zip(places, await asyncio.gather(*played), strict=True)
            ]
        finally:
            await engine.close()

    for trajectory in asyncio.run(run()):
        assert trajectory.error is None and len(trajectory.turns) == 2
        assert {version for step in trajectory.turns for version in step.versions.tolist()} == {1}
        row = row_of(sequences_of(trajectory, np.zeros(trajectory.num_sampled, np.float32)))
        with torch.no_grad():
            scored, _ = policy.score(row, 1.0)
        np.testing.assert_allclose(scored.numpy(), row.behavior_logprobs_N.numpy(), atol=1e-4)
