"""A thousand episodes on one worker: what a turn and an episode cost, what a stuck replica costs the others, what a
process around an environment adds to a step, and what an actor before that process does.

The engine answers after a fixed time and uses next to no processor, so that all the worker's process uses is ours: the
environments, the conversations, the turns made durable, the rows. Prints JSON.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import psutil
import ray

from deploy.assembly.build import load_tokenizer, replica_start
from envs.hosting.host import HostSettings
from learner.model.tokenizer import build_tokenizer
from rollout.agents.agent import Agent
from rollout.buffer.replay_buffer import ReplayBuffer
from rollout.buffer.replay_store import BufferSettings, ReplayStore
from rollout.chat.chat import Chat
from rollout.engines.engine import Completion, Sampling
from rollout.episodes.pool import EnvironmentPool
from rollout.episodes.tasks import TaskStream
from rollout.episodes.worker import RolloutSettings, RolloutWorker
from rollout.wire.trajectory import Float32Array, Task
from rollout.wire.weights import SyncReport, WeightUpdate
from tests.rollout import trouble

GROUPS, GROUP_SIZE, LATENCY_S = 125, 8, 2.0
TURNS = 24
WARM_UP_S, SECONDS = 10.0, 20.0
OPTIONS = {"size": 6, "frozen_probability": 1.0, "max_turns": TURNS, "instructions": False, "view": "map"}
PLAYING_GROUPS, FEW_LATENCY_S, FEW_SECONDS, ROUNDS = 2, 0.1, 10.0, 5
STEPS, STEPS_A_TURN = 2_000, 200


class Waiting:
    """An engine that answers with one of four moves after a fixed time."""

    def __init__(self, chat: Chat, latency: float) -> None:
        self.name, self.version, self.turns = "waiting", 0, 0
        self._latency = latency
        self._random = Random(0)
        self._answers = [self._answer(chat, word) for word in ("left", "down", "right", "up")]

    def _answer(self, chat: Chat, word: str) -> Completion:
        ids = np.array(chat.encode_action(word), np.int32)
        return Completion(ids, np.full(len(ids), -1, np.float32), np.zeros(len(ids), np.int32), "stop")

    async def generate(
        self, prompt_ids: Sequence[int], sampling: Sampling, images: Sequence[str] = ()
    ) -> Completion:
        await asyncio.sleep(self._latency)
        self.turns += 1
        return self._random.choice(self._answers)

    async def score(self, token_ids: Sequence[int]) -> Float32Array:
        raise NotImplementedError

    async def sync(self, update: WeightUpdate) -> SyncReport:
        raise NotImplementedError

    async def ping(self) -> None: ...

    async def close(self) -> None: ...


def _worker(
    folder: Path, chat: Chat, engine: Waiting, tasks: Any, groups: int, pool: EnvironmentPool
) -> tuple[RolloutWorker, ReplayBuffer]:
    buffer = BufferSettings(groups_per_step=groups, max_lag=10_000)
    replay_buffer = ReplayBuffer(ReplayStore(folder, tasks, buffer))
    settings = RolloutSettings(group_size=GROUP_SIZE, concurrent_groups=groups, context_tokens=4096)
    agent = Agent(engine, chat, Sampling(max_tokens=4), settings.context_tokens)
    return RolloutWorker("rollout-0", engine, agent, replay_buffer, settings, 0, pool), replay_buffer


async def _thousand(folder: Path, chat: Chat) -> dict[str, float]:
    engine = Waiting(chat, LATENCY_S)
    tasks = TaskStream("frozen_lake", OPTIONS)
    worker, replay_buffer = _worker(folder, chat, engine, tasks, GROUPS, EnvironmentPool())
    before = psutil.Process().memory_info().rss
    running = asyncio.create_task(worker.run())
    await asyncio.sleep(WARM_UP_S)
    turns, used, began = engine.turns, time.process_time(), time.perf_counter()
    await asyncio.sleep(SECONDS)
    turns, used, seconds = engine.turns - turns, time.process_time() - used, time.perf_counter() - began
    grown = psutil.Process().memory_info().rss - before
    await worker.stop()
    await running
    await replay_buffer.close()
    return {
        "turn_ms": 1000 * used / turns,
        "episode_kb": grown / (GROUPS * GROUP_SIZE) / 1000,
        "turns_per_s": turns / seconds,
        "turns_per_s_without_us": GROUPS * GROUP_SIZE / LATENCY_S,
    }


async def _few(folder: Path, chat: Chat, stuck: bool) -> float:
    """Turns a second of groups that play, beside one more whose replicas are all stuck, or beside none.

    The engine is so slow that the cores are mostly idle: what is looked for is a wait, not a want of processors.
    """
    groups = PLAYING_GROUPS + stuck
    engine = Waiting(chat, FEW_LATENCY_S)

    def tasks(group_id: int) -> Task:
        what = "sleep" if stuck and group_id == 0 else "none"
        return Task.of("trouble", group_id, {"turns": TURNS, "what": what})

    pool = EnvironmentPool(trouble.make, HostSettings(where="process", step_seconds=3600))
    worker, replay_buffer = _worker(folder, chat, engine, tasks, groups, pool)
    running = asyncio.create_task(worker.run())
    # Two episodes of each: by then every process has started, the stuck ones first.
    while engine.turns < 2 * TURNS * PLAYING_GROUPS * GROUP_SIZE:
        await asyncio.sleep(0.1)
    turns, began = engine.turns, time.perf_counter()
    await asyncio.sleep(FEW_SECONDS)
    rate = (engine.turns - turns) / (time.perf_counter() - began)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    await pool.close()
    await replay_buffer.close()
    return rate


async def _step_ms(wheres: Sequence[str]) -> dict[str, float]:
    """Median milliseconds of one step of the lake, by where its replica lives; they step in turns."""
    task = Task.of("frozen_lake", 0, OPTIONS | {"max_turns": STEPS + 1})
    pools = {where: _pool(where) for where in wheres}
    replicas = {where: await pool.take(task) for where, pool in pools.items()}
    seconds: dict[str, list[float]] = {where: [] for where in wheres}
    for replica in replicas.values():
        await replica.reset(0)
    for _ in range(STEPS // STEPS_A_TURN):
        for where, replica in replicas.items():
            for _ in range(STEPS_A_TURN):
                began = time.perf_counter()
                await replica.step("left")
                seconds[where].append(time.perf_counter() - began)
    for where, replica in replicas.items():
        await pools[where].discard(task, replica)
    return {where: 1000 * statistics.median(taken[STEPS_A_TURN:]) for where, taken in seconds.items()}


def _pool(where: str) -> EnvironmentPool:
    host = HostSettings(where=where)
    return EnvironmentPool(host=host, start=replica_start(host))


async def _measure(folder: Path) -> dict[str, float]:
    build_tokenizer(folder / "tokenizer", ("left", "down", "right", "up"))
    chat = Chat(load_tokenizer(str(folder / "tokenizer")))
    figures = await _thousand(folder / "thousand", chat)
    rates = []
    for number in range(ROUNDS):
        order = (True, False) if number % 2 else (False, True)
        both = {stuck: await _few(folder / f"few-{number}-{stuck}", chat, stuck) for stuck in order}
        rates.append(both[True] / both[False])
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        step = await _step_ms(("inline", "process", "ray"))
    finally:
        ray.shutdown()
    return figures | {
        "beside_stuck": statistics.median(rates),
        "beside_stuck_lowest": min(rates),
        "inline_step_ms": step["inline"],
        "process_adds_ms": step["process"] - step["inline"],
        "ray_adds_ms": step["ray"] - step["inline"],
    }


def main() -> dict[str, float]:
    """What a turn takes of a core, what an episode holds, what the stuck and the hosted cost."""
    with tempfile.TemporaryDirectory() as name:
        return {what: round(value, 4) for what, value in asyncio.run(_measure(Path(name))).items()}


if __name__ == "__main__":
    from tests.bench import bench_episodes  # by its importable name, which processes of replicas need

    print(json.dumps(bench_episodes.main()))
