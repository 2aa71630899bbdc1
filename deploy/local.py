"""The whole ring in one process, without Ray: read this first, and debug here, where breakpoint() works.

    exchange.reserve -> worker plays a group -> exchange.add
    exchange.take    -> learner.step -> publish to the engines -> exchange.release -> (reserve goes on)

The same objects run in Ray actors in a cluster (cluster.py). The workers are asyncio tasks; the learner's step runs
in a thread so that they go on meanwhile.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path

from deploy.build import (
    EngineFactory,
    build_exchange,
    build_learner,
    build_worker,
    model_path,
    play_demonstrations,
    vllm_engine,
)
from deploy.config import ConfigError, RunConfig
from deploy.ring import Row, first_failure
from learner.checkpoint import latest
from learner.loop import LearnerLoop
from learner.publish import Snapshot
from rollout.engine import Engine
from rollout.wire.schema import encode
from rollout.wire.store import EpisodeRow
from rollout.wire.trajectory import Task
from rollout.wire.weights import SyncReport, WeightUpdate, inline, write_file
from rollout.worker import RolloutWorker, as_groups

SHARED_MEMORY = Path("/dev/shm")


class LocalPublisher:
    """Gives a snapshot to engines of this process: as arrays, or through shared memory to those with own processes."""

    needs_bytes = True

    def __init__(self, engines: Sequence[Engine], in_process: bool, run_name: str) -> None:
        self._engines = engines
        self._file = None if in_process else SHARED_MEMORY / f"manta-{run_name}.weights"

    async def publish(self, snapshot: Snapshot) -> Sequence[SyncReport]:
        handle = write_file(self._file, snapshot.arrays) if self._file else inline(snapshot.arrays)
        update = WeightUpdate(snapshot.manifest, handle)
        return await asyncio.gather(*(engine.sync(update) for engine in self._engines))

    def close(self) -> None:
        if self._file:
            self._file.unlink(missing_ok=True)


class LocalRing:
    """Every part of a run as plain objects of this process."""

    def __init__(
        self, config: RunConfig, run_folder: Path, engine_factory: EngineFactory = vllm_engine
    ) -> None:
        if config.weights.transfer != "object_store":
            raise ConfigError(
                f"weights.transfer={config.weights.transfer!r} runs between actors: leave --local away"
            )
        self.run_folder = run_folder
        self._config = config
        self._engine_factory = engine_factory
        self._workers: list[RolloutWorker] = []
        self._runs: list[asyncio.Task[None]] = []
        self._started = (
            AsyncExitStack()
        )  # what close() stops, the youngest first: start() may fail on its way

    async def start(self, resume: bool) -> int:
        config = self._config
        path = model_path(config, self.run_folder)
        self._exchange = build_exchange(config, self.run_folder)
        self._started.push_async_callback(self._exchange.close)
        for index in range(config.rollout.workers):
            worker = await build_worker(
                config, f"rollout-{index}", self._exchange, path, self._engine_factory
            )
            self._started.push_async_callback(worker.engine.close)
            self._started.callback(worker.close)
            self._workers.append(worker)
        engines = [worker.engine for worker in self._workers]
        in_process = self._engine_factory is not vllm_engine
        self._publisher = LocalPublisher(engines, in_process, self.run_folder.name)
        self._started.callback(self._publisher.close)
        self._learner = build_learner(config, path)
        if resume:
            # A run stopped before its first checkpoint has none to load: it starts over in its folder.
            if latest(self.run_folder) is not None:
                self._learner.load(self.run_folder)
            await self._exchange.recover(self._learner.version)
        self._loop = LearnerLoop(
            self._learner,
            self._exchange,
            self._publisher,
            config.engine.dtype,
            config.cluster.step_seconds,
            config.checkpoint.keep,
        )
        return self._learner.version

    async def begin_imitation(self) -> int:
        path = model_path(self._config, self.run_folder)
        return self._loop.begin_imitation(await play_demonstrations(self._config, path))

    async def imitate(self, steps: int) -> list[Row]:
        return await asyncio.to_thread(self._loop.imitate, steps)

    async def publish(self) -> Row:
        return await self._loop.publish()

    async def evaluate(self, tasks: Sequence[Task], name: str) -> list[EpisodeRow]:
        shares = [tasks[index :: len(self._workers)] for index in range(len(self._workers))]
        played = await asyncio.gather(*(w.evaluate(s) for w, s in zip(self._workers, shares, strict=True)))
        trajectories = [trajectory for share in played for trajectory in share]
        await self._exchange.archive(name, [encode(group) for group in as_groups(trajectories)])
        return [EpisodeRow.of(trajectory) for trajectory in trajectories]

    def begin_rollouts(self) -> None:
        self._runs = [asyncio.create_task(worker.run(), name=worker.name) for worker in self._workers]

    async def step(self) -> Row:
        return await first_failure(asyncio.create_task(self._loop.step()), self._runs)

    async def save(self) -> None:
        await self._loop.save(self.run_folder)

    async def counters(self) -> Row:
        rows = [worker.counters() for worker in self._workers]
        return {key: sum(row[key] for row in rows) for key in rows[0]}

    async def counts(self) -> dict[str, int]:
        return await self._exchange.counts()

    async def close(self) -> None:
        for run in self._runs:
            run.cancel()
        await asyncio.gather(*self._runs, return_exceptions=True)
        await self._started.aclose()
