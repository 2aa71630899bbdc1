"""The ring as Ray actors: one exchange, one learner, N rollout workers, on this machine or on a cluster.

The driver holds handles and small rows only. Groups go from a worker to the exchange and on to the learner, and weights
from the learner to the engines, through Ray's object store.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import ray

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
from learner.actors import LearnerActor, ObjectStorePublisher
from learner.checkpoint import latest
from learner.learner import Learner
from learner.publish import Publisher
from rollout.actors import RolloutActor, demonstrate
from rollout.wire.actors import ExchangeActor
from rollout.wire.store import EpisodeRow
from rollout.wire.trajectory import Task

CLOSE_SECONDS = 30.0  # what engines and ledger are given to stop by themselves


def connect(config: RunConfig) -> None:
    """Join the cluster named by the configuration or by the job that runs us, or start a local Ray."""
    if ray.is_initialized():
        return
    address = config.cluster.address
    if address or _inside_a_job():
        ray.init(address=address or "auto", log_to_driver=False, logging_level="ERROR")
    else:
        port = config.cluster.dashboard_port
        dashboard = {"include_dashboard": bool(port)} | ({"dashboard_port": port} if port else {})
        ray.init(address="local", log_to_driver=False, logging_level="ERROR", **dashboard)


def require_capacity(config: RunConfig) -> None:
    """Refuse a request that the cluster cannot hold, saying what is missing."""
    wanted = demand(config)
    deadline = time.monotonic() + config.cluster.capacity_seconds
    while True:
        held = ray.cluster_resources()
        missing = {
            name: amount - held.get(name, 0.0)
            for name, amount in wanted.items()
            if amount > held.get(name, 0.0)
        }
        if not missing:
            return
        if time.monotonic() > deadline or _fixed_size():
            lacking = ", ".join(f"{amount:g} {name}" for name, amount in missing.items())
            asked = ", ".join(f"{amount:g} {name}" for name, amount in wanted.items())
            raise ConfigError(
                f"the cluster is too small: {lacking} missing (the run asks for {asked}); "
                "lower rollout.workers or rollout.cpus_per_worker, or add nodes"
            )
        time.sleep(0.5)


def demand(config: RunConfig) -> dict[str, float]:
    """The resources all actors of a run need together, in Ray's names."""
    workers, rollout = config.rollout.workers, config.rollout
    wanted = {"CPU": workers * rollout.cpus_per_worker + config.cluster.learner_cpus}
    gpus = workers * rollout.gpus_per_worker + learner_gpus(config)
    return wanted | ({"GPU": gpus} if gpus else {})


def learner_gpus(config: RunConfig) -> float:
    """A whole GPU; with "ipc", which hands over one GPU's own memory, what the engines leave of the one they share."""
    if config.learner.model.device != "cuda":
        return 0
    shared = config.weights.transfer == "ipc"
    return 1 - config.rollout.workers * config.rollout.gpus_per_worker if shared else 1


class RayRing:
    """Every part of a run as an actor; the methods are those of `deploy.ring.Ring`."""

    def __init__(
        self, config: RunConfig, run_folder: Path, engine_factory: EngineFactory = vllm_engine
    ) -> None:
        self.run_folder = run_folder.resolve()
        self._config = config
        self._engine_factory = engine_factory
        self._exchange: Any = None
        self._learner: Any = None
        self._workers: dict[str, Any] = {}
        self._starts: list[asyncio.Future[str]] = []
        self._runs: list[asyncio.Future[None]] = []

    async def start(self, resume: bool) -> int:
        config = self._config
        self._path = model_path(config, self.run_folder)
        # Every loop of every worker may wait for a slot; the learner's calls must find a place beside them.
        calls = 2 * config.rollout.workers * config.rollout.concurrent_groups + 100
        exchange = _actor(ExchangeActor, max_concurrency=calls)
        self._exchange = exchange.remote(partial(build_exchange, config, self.run_folder))
        for index in range(config.rollout.workers):
            name = f"rollout-{index}"
            options = {"num_cpus": config.rollout.cpus_per_worker, "num_gpus": config.rollout.gpus_per_worker}
            build = partial(_worker, config, self._path, self._engine_factory)
            self._workers[name] = _actor(RolloutActor, **options).remote(name, self._exchange, build)
        learner = _actor(LearnerActor, num_cpus=config.cluster.learner_cpus, num_gpus=learner_gpus(config))
        self._learner = learner.remote(
            partial(build_learner, config, self._path),
            self._exchange,
            partial(_publisher, config, self._workers),
            config.engine.dtype,
            config.cluster.step_seconds,
            config.checkpoint.keep,
        )
        self._starts = [asyncio.ensure_future(self._start_worker(name)) for name in self._workers]
        # A run stopped before its first checkpoint has none to load: it starts over in its folder.
        load = resume and latest(self.run_folder) is not None
        _, version = await self._within("the learner", self._learner.start.remote(self.run_folder, load))
        if resume:
            await self._within("the exchange", self._exchange.recover.remote(version))
        return int(version)

    async def begin_imitation(self) -> int:
        play = partial(_play, self._config, self._path)
        rows = demonstrate.options(num_cpus=0).remote(play)
        return int(await self._within("the demonstrations", self._learner.begin_imitation.remote(rows)))

    async def imitate(self, steps: int) -> list[Row]:
        rows: list[Row] = await self._within("imitation", self._learner.imitate.remote(steps))
        return rows

    async def publish(self) -> Row:
        # Engines start beside the warm start; this is the first moment that needs them.
        await asyncio.gather(*self._starts)
        row: Row = await self._within("the weight sync", self._learner.publish.remote())
        return row

    async def evaluate(self, tasks: Sequence[Task], name: str) -> list[EpisodeRow]:
        workers = list(self._workers.values())
        shares = [list(tasks[index :: len(workers)]) for index in range(len(workers))]
        playing = asyncio.gather(*(w.evaluate.remote(s, name) for w, s in zip(workers, shares, strict=True)))
        played = await self._within(f"evaluation {name!r}", playing, self._config.evaluation.seconds)
        return [row for share in played for row in share]

    def begin_rollouts(self) -> None:
        self._runs = [
            asyncio.ensure_future(_awaited(worker.run.remote())) for worker in self._workers.values()
        ]

    async def step(self) -> Row:
        # The learner itself waits step_seconds for its groups and says what is missing; this limit is for the learner.
        limit = 2 * self._config.cluster.step_seconds
        step = asyncio.ensure_future(self._within("the learner's step", self._learner.step.remote(), limit))
        return await first_failure(step, self._runs)

    async def save(self) -> None:
        await self._within("the checkpoint", self._learner.save.remote(self.run_folder))

    async def counters(self) -> Row:
        counting = asyncio.gather(*(worker.counters.remote() for worker in self._workers.values()))
        rows = await self._within("a rollout worker's counters", counting)
        return {key: sum(row[key] for row in rows) for key in rows[0]}

    async def counts(self) -> dict[str, int]:
        counts: dict[str, int] = await self._within("the exchange", self._exchange.counts.remote())
        return counts

    async def close(self) -> None:
        """Let the engines stop their processes and the ledger close, then end the actors."""
        pending: list[asyncio.Future[Any]] = [*self._starts, *self._runs]
        for waiting in pending:
            waiting.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
        # A start that failed on its way has made only some of them.
        closable = [actor for actor in (*self._workers.values(), self._exchange) if actor is not None]
        if closable:
            closing = asyncio.gather(
                *(_awaited(actor.close.remote()) for actor in closable), return_exceptions=True
            )
            await asyncio.wait([closing], timeout=CLOSE_SECONDS)
        for actor in (*closable, *([self._learner] if self._learner is not None else [])):
            ray.kill(actor)

    async def _start_worker(self, name: str) -> str:
        host: str = await self._within(f"rollout worker {name}", self._workers[name].start.remote())
        return host

    async def _within(self, what: str, pending: Any, limit: float | None = None) -> Any:
        limit = limit or self._config.cluster.start_seconds
        answer: asyncio.Future[Any] = asyncio.ensure_future(_awaited(pending))
        try:
            done, _ = await asyncio.wait({answer}, timeout=limit)
            if not done:
                raise TimeoutError(f"{what} did not answer within {limit:g} s")
            return answer.result()  # a TimeoutError of its own says more than ours would
        finally:
            answer.cancel()  # whoever no longer waits (Ctrl-C) does not leave it running


def _actor(cls: type, **options: Any) -> Any:
    return ray.remote(cls).options(**({"num_cpus": 0} | options))


async def _awaited(reference: Any) -> Any:
    return await reference


async def _worker(
    config: RunConfig, path: str, engine_factory: EngineFactory, name: str, exchange: Any
) -> Any:
    return await build_worker(config, name, exchange, path, engine_factory)


def _publisher(config: RunConfig, workers: dict[str, Any], learner: Learner) -> Publisher:
    if config.weights.transfer == "object_store":
        return ObjectStorePublisher(workers, config.weights.sync_seconds)
    from rollout.vllm_native import NativePublisher

    return NativePublisher(
        config.weights.transfer,
        learner.policy.named_weights,
        workers,
        config.engine.tensor_parallel_size,
        ray.util.get_node_ip_address(),
        config.weights.sync_seconds,
    )


def _play(config: RunConfig, path: str) -> Any:
    return asyncio.run(play_demonstrations(config, path))


def _inside_a_job() -> bool:
    return "RAY_ADDRESS" in os.environ


def _fixed_size() -> bool:
    # A local Ray never grows; an autoscaled cluster may, so it is given time.
    return not _inside_a_job()
