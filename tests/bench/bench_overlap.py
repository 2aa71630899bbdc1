"""Do rollout and learning overlap? Wall time of a step with both at work against the longer of the two alone.

The actors are those of a run (replay buffer, learner, rollout worker, under Ray), and so are store, rows, object store
and publishing. What they do is replaced by waiting: every request to the engine and every learner step sleeps for a
fixed time, so that what is measured is the orchestration and not two parts fighting for the same cores. Every round
plays the same number of groups three ways: rollout alone (a buffer with room for all of them), learner alone (that full
buffer), and both at once one version apart, from which the first and last steps are left out. Prints JSON.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import ray

from deploy.assembly.build import EngineFactory, build_worker, load_tokenizer
from deploy.assembly.models import model_path
from deploy.config.config import RunConfig
from learner.model.policy import Policy
from learner.parallel.ranks import Ranks
from learner.settings import ModelSettings
from learner.training.actors import LearnerActor
from rollout.buffer.actors import RemoteReplayBuffer, ReplayBufferActor
from rollout.buffer.replay_buffer import ReplayBuffer
from rollout.buffer.replay_store import ReplayStore
from rollout.engines.engine import Engine
from rollout.engines.scripted_engine import ScriptedEngine
from rollout.episodes.actors import RolloutActor
from rollout.episodes.tasks import TaskStream
from rollout.wire.trajectory import Group
from tests.bench.player import recipe

ROUNDS, STEPS, EDGE = 5, 8, 2  # EDGE: steps at either end of an overlapped phase that are not steady
GROUPS_PER_STEP, GROUP_SIZE, TURNS = 8, 4, 6
LATENCY_S, STEP_S = 0.05, 0.3


class RoundsBuffer(ReplayBufferActor):
    """A replay buffer that is made anew for every phase, so that the other actors can stay."""

    def __init__(self, folder: Path, config: RunConfig) -> None:
        self._folder, self._config, self._phases = folder, config, 0
        super().__init__(partial(self._fresh, 1, 0))

    async def renew(self, version: int, steps: int, max_lag: int) -> None:
        """Begin a phase of that many steps, going on from `version`."""
        await self._replay_buffer.close()
        self._replay_buffer = self._fresh(version + steps, max_lag)
        await self._replay_buffer.rollback(version)

    def _fresh(self, total_steps: int, max_lag: int) -> ReplayBuffer:
        self._phases += 1
        config, folder = self._config, self._folder / f"phase-{self._phases}"
        tasks = TaskStream(config.env.id, config.env.options, self._phases)
        buffer = config.buffer.model_copy(update={"max_lag": max_lag})
        return ReplayBuffer(ReplayStore(folder, tasks, buffer, total_steps))


class SleepingLearner:
    """A learner whose step is a wait. Its policy is real, for there must be something to publish."""

    def __init__(self, path: str, ranks: Ranks) -> None:
        self.version = 0
        self.ranks = ranks
        self.policy = Policy(ModelSettings(path=path))

    def step(self, groups: list[Group]) -> dict[str, float]:
        time.sleep(STEP_S)
        self.version += 1
        return {"tokens_processed": sum(t.num_sampled for group in groups for t in group.trajectories)}


async def scripted_engine(seconds: float, config: RunConfig, name: str, path: str) -> Engine:
    """Walks into the wall, a move a request, so that every episode has all its turns; a move takes so long."""
    del config
    latency = partial(asyncio.sleep, seconds)
    return ScriptedEngine(load_tokenizer(path), _left, latency=latency, name=name, record=False)


def _left(prompt: str, rng: random.Random) -> str:
    del prompt, rng
    return "left"


class Rig:
    """The three actors of a run, and its phases."""

    def __init__(
        self,
        config: RunConfig,
        folder: Path,
        path: str,
        factory: EngineFactory,
        learner: Callable[[Ranks], Any],
    ) -> None:
        self._folder = folder
        self._version = 0
        self._per_step = config.buffer.groups_per_step
        self._replay_buffer = _actor(RoundsBuffer).remote(folder, config)
        build = partial(build_worker, config, path, factory)
        self._worker = _actor(RolloutActor).remote("rollout-0", self._replay_buffer, build)
        self._groups = config.buffer.groups_per_step * STEPS
        self._learner = _actor(LearnerActor).remote(
            learner, RemoteReplayBuffer(self._replay_buffer), config.engine.dtype, 120.0, 1
        )

    async def start(self) -> None:
        await self._worker.start.remote()
        await self._learner.start.remote(self._folder, False, Ranks)
        await self._publish()

    async def round(self) -> dict[str, float]:
        """Seconds a step of each part alone, and of both together: steady, and over the whole phase."""
        rollout, learner = await self._alone()
        ends = await self._together()
        steady = (ends[-1 - EDGE] - ends[EDGE]) / (len(ends) - 1 - 2 * EDGE)
        return {"rollout": rollout, "learner": learner, "both": steady, "both_whole": ends[-1] / STEPS}

    async def close(self) -> None:
        await self._worker.close.remote()
        await self._replay_buffer.close.remote()

    async def _alone(self) -> tuple[float, float]:
        # With a lag of STEPS there is a slot for every group: the worker plays them all without a learner, and the
        # learner then finds them all there.
        await self._replay_buffer.renew.remote(self._version, STEPS, STEPS)
        playing = self._worker.run.remote()
        rollout = await _timed(self._all_complete())
        learner = await _timed(self._learn(STEPS))
        await playing
        return rollout / STEPS, learner / STEPS

    async def _all_complete(self) -> None:
        while (await self._replay_buffer.state.remote())["ready"] < self._groups:
            await asyncio.sleep(0.005)

    async def _together(self) -> list[float]:
        """When each step ended, in seconds since the phase began; the first entry is its beginning."""
        await self._replay_buffer.renew.remote(self._version, STEPS, 1)
        began = time.perf_counter()
        playing = self._worker.run.remote()
        ends = [0.0]
        for _ in range(STEPS):
            await self._learn(1)
            ends.append(time.perf_counter() - began)
        await playing
        return ends

    async def _learn(self, steps: int) -> None:
        for _ in range(steps):
            self._version += 1
            await self._learner.train.remote(self._version)
            await self._publish()
            await self._replay_buffer.release.remote(self._version)

    async def _publish(self) -> None:
        update = await self._learner.publish_weights.remote()
        await self._worker.sync.remote(update)
        await self._learner.unpin_weights.remote(update.version, update.handle)


def _actor(cls: type) -> Any:
    return ray.remote(cls).options(num_cpus=0)


async def _timed(work: Awaitable[Any]) -> float:
    began = time.perf_counter()
    await work
    return time.perf_counter() - began


async def measure(rig: Rig, rounds: int) -> list[dict[str, float]]:
    await rig.start()
    await rig.round()  # warm-up
    try:
        return [await rig.round() for _ in range(rounds)]
    finally:
        await rig.close()


def summary(rounds: list[dict[str, float]]) -> dict[str, float]:
    def ratio(part: str) -> float:
        return statistics.median(one[part] / max(one["rollout"], one["learner"]) for one in rounds)

    parts = {f"{part}_s": round(statistics.median(one[part] for one in rounds), 3) for part in rounds[0]}
    return {"ratio": round(ratio("both"), 3), "ratio_with_ends": round(ratio("both_whole"), 3)} | parts


def main() -> dict[str, float]:
    """Median of the rounds' ratios (target: at most 1.25), and the seconds a step it is made of."""
    config = recipe(
        f"buffer.groups_per_step={GROUPS_PER_STEP}",
        f"rollout.concurrent_groups={GROUPS_PER_STEP}",
        f"rollout.group_size={GROUP_SIZE}",
        f"rollout.max_turns={TURNS}",
    )
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        with tempfile.TemporaryDirectory() as name:
            path = model_path(config, Path(name))
            rig = Rig(
                config, Path(name), path, partial(scripted_engine, LATENCY_S), partial(SleepingLearner, path)
            )
            return summary(asyncio.run(measure(rig, ROUNDS)))
    finally:
        ray.shutdown()


if __name__ == "__main__":
    print(json.dumps(main()))
