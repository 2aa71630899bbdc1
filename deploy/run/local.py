"""The whole ring in one process, without Ray: read this first, and debug here, where breakpoint() works.

    buffer.reserve -> worker plays a group -> buffer.add
    buffer.take    -> learner.train -> publish_weights -> engines sync -> buffer.release -> (reserve goes on)

The same objects run in Ray actors in a cluster (cluster.py). The workers are asyncio tasks; the learner's step runs
in a thread so that they go on meanwhile. Nobody supervises here: the first failure ends the run, with its traceback.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Any

from deploy.assembly.build import EngineFactory, replay_buffer_builder, start_engine
from deploy.assembly.league import League
from deploy.assembly.runtime import Met, Row, alone, first_failure, waited_for
from deploy.assembly.turns import Turns, sleep_level, step_in_turn
from deploy.config.config import RunConfig
from deploy.config.config_errors import ConfigError
from deploy.report.noticed import Noticed
from deploy.report.phases import Startup
from deploy.run.in_process import LearnerHere
from learner.training.loop import sync_metrics
from rollout.buffer.replay_store import EpisodeRow
from rollout.engines.engine import sleeping
from rollout.episodes.evaluation import EvaluationPlan, as_groups, evaluation_row
from rollout.episodes.loop_watch import LoopWatch
from rollout.episodes.worker import RolloutWorker
from rollout.wire.metrics import joined
from rollout.wire.notices import Notices
from rollout.wire.schema import encode
from rollout.wire.trajectory import Task
from rollout.wire.weights import ByteArray, Handle, inline, write_memory


def _place_inline(arrays: Sequence[ByteArray]) -> tuple[Handle, Any]:
    return inline(arrays), None


class LocalRuntime(LearnerHere):
    """Every part of a run as plain objects of this process; of one policy, where the run has several (several.py).

    league: the policies that it meets; None: its own versions, if the recipe has a league. met: see several.py.
    """

    def __init__(
        self,
        config: RunConfig,
        run_folder: Path,
        engine_factory: EngineFactory = start_engine,
        startup: Startup | None = None,
        say: Callable[[str], None] = print,
        league: League | None = None,
        met: Met = alone,
    ) -> None:
        if config.weights.transfer != "object_store":
            raise ConfigError(
                f"weights.transfer={config.weights.transfer!r} runs between actors: leave --local away"
            )
        if config.learner.ranks > 1:
            raise ConfigError(
                f"learner.ranks={config.learner.ranks} are processes of their own: leave --local away, or use 1"
            )
        if remote := [each.section for each in config.environments if each.host.where == "ray"]:
            raise ConfigError(
                f"{remote[0]}.host.where='ray' has replicas in actors: leave --local away, or use 'process'"
            )
        super().__init__(config, run_folder)
        self._engine_factory = engine_factory
        self._league = league or League.alone(config, run_folder)
        self._met = met
        self._noticed = Noticed(run_folder, say)
        self._startup = startup or Startup()
        self._turns: Turns | None = None  # of engines and learner, where they share a device
        if config.cluster.colocate == "turns":
            self._turns = Turns(self._sleep, lambda: self._learner.onload(), lambda: self._learner.offload())
        self._workers: list[RolloutWorker] = []
        self._runs: list[asyncio.Task[None]] = []
        self._started = (
            AsyncExitStack()
        )  # what close() stops, the last one first: start() may fail on its way

    async def start(self, resume: bool) -> int:
        config = self._config
        loop = asyncio.get_running_loop()

        def tell(text: str) -> None:
            loop.call_soon_threadsafe(self._noticed.hear, "", [text])

        self._started.enter_context(Notices(tell))
        self._replay_buffer = replay_buffer_builder(
            config, self.run_folder, self._league.owner(config.policy)
        )()
        self._started.push_async_callback(self._replay_buffer.close)
        if self._turns is None:
            await self._start_workers()
        place = write_memory if config.engine.placement.maps_weights else _place_inline
        with self._startup.timed("learner"):
            keep = partial(self._league.keep, config.policy)
            version = self.start_learner(self._replay_buffer, place, resume, keep)
        if resume:
            await self._replay_buffer.rollback(version, new_driver=True)
        return version

    async def _start_workers(self) -> None:
        config, buffer = self._config, self._replay_buffer
        for index in range(config.workers):
            name = f"rollout-{index}"
            with self._startup.timed("engines"):
                factory = self._engine_factory
                worker = await self._league.build_worker(config, self.path, factory, name, buffer)
            self._started.push_async_callback(worker.engine.close)
            self._started.push_async_callback(worker.close)
            self._workers.append(worker)

    async def begin_stage(self, index: int) -> tuple[int, int]:
        if self._turns is not None:
            await self._turns.learner()
        return await super().begin_stage(index)

    async def publish(self, saves: bool = False) -> Row:
        if self._turns is not None:
            await self._turns.learner()
            if saves:
                await self._learner.copy(self.run_folder)
        update = await self._learner.publish_weights()
        if self._turns is not None:
            await self._turns.engines()
            if not self._workers:
                await self._start_workers()
        reports = await asyncio.gather(*(worker.sync(update) for worker in self._workers))
        await self._learner.unpin_weights(update.version, update.handle)
        if update.version >= 0:
            await self._met(update.version)
        return sync_metrics(reports)

    async def evaluate(self, tasks: Sequence[Task], name: str, plan: EvaluationPlan) -> list[EpisodeRow]:
        shares = [tasks[index :: len(self._workers)] for index in range(len(self._workers))]
        played = await asyncio.gather(
            *(w.evaluate(s, plan) for w, s in zip(self._workers, shares, strict=True))
        )
        trajectories = [trajectory for share in played for trajectory in share]
        await self._replay_buffer.archive(
            name, [encode(group) for group in as_groups(trajectories, self._config.policy)]
        )
        return [evaluation_row(trajectory, plan.majority) for trajectory in trajectories]

    def begin_rollouts(self) -> None:
        self._started.callback(LoopWatch().close)
        self._runs = [asyncio.create_task(worker.run(), name=worker.name) for worker in self._workers]

    async def step(
        self, number: int, before_publish: Awaitable[object] | None = None, saves: bool = False
    ) -> Row:
        return await first_failure(asyncio.create_task(self._step(number, before_publish, saves)), self._runs)

    async def _step(self, number: int, before_publish: Awaitable[object] | None, saves: bool) -> Row:
        began = time.perf_counter()
        if self._turns is None:
            row = await self._learner.train(number)
            waited = await waited_for(before_publish)
        else:
            buffer, seconds = self._replay_buffer, self._config.cluster.step_timeout_seconds
            words = number, buffer, seconds, self._learner.train, self.publish, before_publish
            row, waited = await step_in_turn(self._turns, *words)
        trained = time.perf_counter()
        published = await self.publish(saves)
        await self._replay_buffer.release(number)
        ended = time.perf_counter()
        return joined(row, waited, published, {"publish_s": ended - trained, "step_s": ended - began})

    async def _sleep(self) -> None:
        level = sleep_level(self._config)
        await asyncio.gather(*(sleeping(worker.engine).sleep(level) for worker in self._workers))

    async def counters(self) -> Row:
        total: Counter[str] = Counter()
        for worker in self._workers:
            total.update(worker.counters())
        return dict(total)

    async def counts(self) -> dict[str, int]:
        return await self._replay_buffer.counts()

    async def close(self) -> None:
        for run in self._runs:
            run.cancel()
        await asyncio.gather(*self._runs, return_exceptions=True)
        await self._started.aclose()
