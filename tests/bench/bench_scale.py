"""From one worker to eight: throughput on a fixed-latency engine, and what driver and replay buffer take of a core.

The actors are those of a run; every completion takes LATENCY_S and no core, so that eight workers fit on two cores and
what is measured is whether anything they share holds them up. Then the replay buffer alone is driven as fast as feeders
can hand in groups, which says how many such workers it could serve. Prints JSON.
"""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import ray

from deploy.assembly.build import build_worker
from deploy.assembly.models import model_path
from deploy.cluster.ray_actors import actor
from deploy.config.config import RunConfig
from rollout.buffer.actors import RemoteReplayBuffer, ReplayBufferActor
from rollout.buffer.replay_buffer import ReplayBuffer
from rollout.buffer.replay_store import EpisodeRow, ReplayStore
from rollout.episodes.actors import RolloutActor
from rollout.wire.schema import decode, encode
from rollout.wire.trajectory import Group
from tests.bench.bench_overlap import scripted_engine
from tests.bench.player import recipe

SIZES = (1, 2, 4, 8)
GROUPS, GROUP_SIZE, TURNS = 2, 4, 6  # a worker's groups at a time; episodes of each; turns of each
LATENCY_S = 0.25
SECONDS, WARM_UP_S = 12.0, 3.0
FEEDERS, FEED_S, LANES = (1, 2, 3), 6.0, 8


class OpenBuffer(ReplayBufferActor):
    """A replay buffer with room for everything, and what its process has used of a core."""

    def __init__(self, folder: Path, config: RunConfig) -> None:
        buffer = config.buffer.model_copy(update={"max_lag": 100_000})
        tasks = partial(_task, config)
        super().__init__(lambda: ReplayBuffer(ReplayStore(folder, tasks, buffer)))

    async def used(self) -> tuple[int, float]:
        """Groups handed in, and seconds of processor time since the start."""
        return (await self._replay_buffer.counts())["complete"], time.process_time()


@ray.remote(num_cpus=0)
class Feeder:
    """Hands in one group again and again, as a worker whose episodes take no time."""

    def __init__(self, name: str, replay_buffer: Any, sample: Group) -> None:
        self._name, self._replay_buffer, self._sample = name, RemoteReplayBuffer(replay_buffer), sample

    async def feed(self, seconds: float) -> int:
        """Groups handed in within so many seconds."""
        ends = time.perf_counter() + seconds
        return sum(await asyncio.gather(*(self._lane(worker_loop, ends) for worker_loop in range(LANES))))

    async def _lane(self, worker_loop: int, ends: float) -> int:
        done = 0
        rows = [EpisodeRow.of(trajectory) for trajectory in self._sample.trajectories]
        while time.perf_counter() < ends:
            assignment = await self._replay_buffer.reserve(self._name, worker_loop)
            assert assignment is not None
            group = Group(assignment.slot, self._sample.trajectories)
            await self._replay_buffer.add(assignment.slot, encode(group), rows)
            done += 1
        return done


def _task(config: RunConfig, group_id: int) -> Any:
    from deploy.assembly.build import training_tasks

    return training_tasks(config)(group_id)


async def _workers(config: RunConfig, path: str, replay_buffer: Any, size: int) -> dict[str, float]:
    engine = partial(scripted_engine, LATENCY_S)
    build = partial(build_worker, config, path, engine)
    names = [f"rollout-{size}-{index}" for index in range(size)]
    workers = [actor(RolloutActor).remote(name, replay_buffer, build) for name in names]
    await asyncio.gather(*(worker.start.remote() for worker in workers))
    runs = [worker.run.remote() for worker in workers]
    await asyncio.sleep(WARM_UP_S)

    async def turns() -> float:
        return sum(row["turns"] for row in await asyncio.gather(*(w.counters.remote() for w in workers)))

    (groups, used), began, driver, before = (
        await replay_buffer.used.remote(), time.perf_counter(), time.process_time(), await turns(),
    )  # fmt: skip
    await asyncio.sleep(SECONDS)
    after, seconds = await turns(), time.perf_counter() - began
    groups_after, used_after = await replay_buffer.used.remote()
    figures = {
        "turns_per_s": (after - before) / seconds,
        "groups_per_s": (groups_after - groups) / seconds,
        "buffer_share": (used_after - used) / seconds,
        "driver_share": (time.process_time() - driver) / seconds,
    }
    await asyncio.gather(*(worker.stop.remote() for worker in workers))
    await asyncio.gather(*runs)
    for name, worker in zip(names, workers, strict=True):
        await replay_buffer.reassign.remote(name)
        ray.kill(worker)
    return figures


async def _saturated(replay_buffer: Any, sample: Group) -> float:
    """The most groups a second that the replay buffer took in."""
    most = 0.0
    for count in FEEDERS:
        feeders = [Feeder.remote(f"feeder-{count}-{index}", replay_buffer, sample) for index in range(count)]  # type: ignore[attr-defined]
        began = time.perf_counter()
        fed = await asyncio.gather(*(feeder.feed.remote(FEED_S) for feeder in feeders))
        most = max(most, sum(fed) / (time.perf_counter() - began))
        for index, feeder in enumerate(feeders):
            await replay_buffer.reassign.remote(f"feeder-{count}-{index}")
            ray.kill(feeder)
    return most


async def measure(config: RunConfig, folder: Path, path: str) -> dict[str, float]:
    replay_buffer = actor(OpenBuffer, max_concurrency=10_000).remote(folder, config)
    rates = {size: await _workers(config, path, replay_buffer, size) for size in SIZES}
    (batch, *_) = await replay_buffer.take.remote(0, 60.0)
    most = await _saturated(replay_buffer, decode(batch))
    one, largest = rates[SIZES[0]], rates[SIZES[-1]]
    linear = largest["turns_per_s"] / (SIZES[-1] * one["turns_per_s"])
    return {
        "linear": round(linear, 3),
        **{f"turns_per_s_{size}": round(rates[size]["turns_per_s"], 1) for size in SIZES},
        "buffer_share_of_a_core": round(largest["buffer_share"], 3),
        "driver_share_of_a_core": round(largest["driver_share"], 3),
        "most_groups_per_s": round(most, 1),
        "workers_at_saturation": round(most / (largest["groups_per_s"] / SIZES[-1])),
    }


def main() -> dict[str, float]:
    """`linear`: turns per second of eight workers, of eight times those of one (target: at least 0.85)."""
    config = recipe(
        "buffer.groups_per_step=8",
        f"rollout.concurrent_groups={GROUPS}",
        f"rollout.group_size={GROUP_SIZE}",
        f"rollout.max_turns={TURNS}",
    )
    os.environ["OMP_NUM_THREADS"] = "1"
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        with tempfile.TemporaryDirectory() as name:
            path = model_path(config, Path(name))
            return asyncio.run(measure(config, Path(name), path))
    finally:
        ray.shutdown()


if __name__ == "__main__":
    print(json.dumps(main()))
