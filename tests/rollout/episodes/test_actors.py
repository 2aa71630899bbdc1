"""A rollout actor tells where it lives, answers while it plays, and leaves when its process is asked to."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray
from transformers import AutoTokenizer

from learner.model.tokenizer import build_tokenizer
from rollout.agents.agent import Agent
from rollout.chat.chat import Chat
from rollout.engines.engine import EngineDied, Sampling
from rollout.engines.scripted_engine import ScriptedEngine
from rollout.episodes.actors import RolloutActor
from rollout.episodes.worker import RolloutSettings, RolloutWorker
from rollout.wire.trajectory import Slot, Task
from tests.rollout.fake_replay_buffer import FakeReplayBuffer

SETTINGS = RolloutSettings(group_size=3, concurrent_groups=2, max_turns=12, episode_seconds=60.0)
LAKE = {"slippery": True, "max_turns": 12, "size": 6}


class ReplayBufferActor(FakeReplayBuffer):
    """The fake replay buffer where an actor's calls reach it."""

    async def reassign(self, worker: str) -> int:  # type: ignore[override]
        assert {name for name, _ in self.held} <= {worker}
        return super().reassign()

    async def told(self) -> tuple[list[int], list[tuple[int, int, int]], int]:
        """Groups that are complete, recorded turns, and groups that somebody holds."""
        return sorted(self.groups), self.turns(), len(self.held)


class Mortal(ScriptedEngine):
    async def ping(self) -> None:
        if self.requests:
            raise EngineDied("its process is gone")


async def build(
    tokenizer: str, turn_seconds: float, mortal: bool, name: str, replay_buffer: Any
) -> RolloutWorker:
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    engine = (Mortal if mortal else ScriptedEngine)(
        loaded,
        lambda prompt, rng: rng.choice(["left", "right", "down", "up"]),
        0,
        partial(asyncio.sleep, turn_seconds),
    )
    agent = Agent(engine, Chat(loaded), Sampling(max_tokens=8), 4096)
    return RolloutWorker(name, engine, agent, replay_buffer, SETTINGS, run_seed=1)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer(folder, ("left", "right", "down", "up"))
    return str(folder)


def actor(cls: Any, *arguments: Any) -> Any:
    return ray.remote(cls).options(num_cpus=0, max_concurrency=50).remote(*arguments)


@pytest.mark.slow
def test_asked_to_end_it_leaves_and_another_goes_on_with_every_turn(
    cluster: None, tokenizer_path: str
) -> None:
    slots = [Slot(index, 0, Task.of("frozen_lake", 40 + index, LAKE), 0) for index in range(3)]
    replay_buffer = actor(ReplayBufferActor, slots)
    leaver = actor(RolloutActor, "leaver", replay_buffer, partial(build, tokenizer_path, 0.2, False))
    where = ray.get(leaver.start.remote(), timeout=120)
    assert where.node == ray.get_runtime_context().get_node_id()
    assert str(where.pid) in Path(where.log).name, "the log that Ray keeps of this very process"
    run = leaver.run.remote()
    while ray.get(leaver.counters.remote(), timeout=60)["turns"] < 8:
        pass
    beat = ray.get(leaver.ping.remote(), timeout=60)
    assert set(beat) == {"last_turn_seconds", "loop_lag"}
    assert "_play_groups" in ray.get(leaver.stacks.remote(), timeout=60)

    os.kill(where.pid, signal.SIGTERM)
    with pytest.raises(ray.exceptions.RayActorError):
        while True:  # it answers while it leaves, and then there is nobody
            ray.get(leaver.counters.remote(), timeout=60)
    complete, turns, held = ray.get(replay_buffer.told.remote(), timeout=60)
    assert held == 0
    assert len(turns) >= 8
    del run

    stayer = actor(RolloutActor, "stayer", replay_buffer, partial(build, tokenizer_path, 0.0, False))
    ray.get(stayer.start.remote(), timeout=120)
    ray.get(stayer.run.remote(), timeout=120)
    assert ray.get(replay_buffer.told.remote(), timeout=60)[0] == [0, 1, 2]
    unfinished = [turn for turn in turns if turn[0] not in complete]
    assert ray.get(stayer.counters.remote(), timeout=60)["turns_reused"] == len(unfinished)


@pytest.mark.slow
def test_an_actor_whose_engine_died_says_so_when_asked(cluster: None, tokenizer_path: str) -> None:
    replay_buffer = actor(ReplayBufferActor, [Slot(0, 0, Task.of("frozen_lake", 1), 0)])
    worker = actor(RolloutActor, "w", replay_buffer, partial(build, tokenizer_path, 0.0, True))
    ray.get(worker.start.remote(), timeout=120)
    ray.get(worker.ping.remote(), timeout=60)
    ray.get(worker.run.remote(), timeout=120)
    with pytest.raises(EngineDied, match="its process is gone"):
        ray.get(worker.ping.remote(), timeout=60)
