"""A rollout worker as a Ray actor: a thin shell that builds a `RolloutWorker` where it runs."""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pyarrow as pa
import ray

from rollout.vllm_engine import VllmEngine
from rollout.wire.actors import RemoteExchange
from rollout.wire.schema import encode
from rollout.wire.store import EpisodeRow
from rollout.wire.trajectory import Task
from rollout.wire.weights import SyncReport, WeightManifest, WeightUpdate
from rollout.worker import RolloutWorker, as_groups

BuildWorker = Callable[[str, Any], Awaitable[RolloutWorker]]


class RolloutActor:
    """`build(name, exchange)` makes the worker; nothing of it exists before `start`."""

    def __init__(self, name: str, exchange: Any, build: BuildWorker) -> None:
        self._name = name
        self._exchange = RemoteExchange(exchange)
        self._build = build
        self._worker: RolloutWorker | None = None

    async def start(self) -> str:
        """Start the engine; returns the host it runs on."""
        self._worker = await self._build(self._name, self._exchange)
        return socket.gethostname()

    async def run(self) -> None:
        """Play groups until the exchange says that the run is over."""
        await self._started().run()

    async def evaluate(self, tasks: Sequence[Task], name: str) -> list[EpisodeRow]:
        """Play one episode a task; the rows go to the store under `name`, the outcomes to the caller."""
        trajectories = await self._started().evaluate(tasks)
        await self._exchange.archive(name, [encode(group) for group in as_groups(trajectories)])
        return [EpisodeRow.of(trajectory) for trajectory in trajectories]

    async def sync(self, update: WeightUpdate) -> SyncReport:
        """Load one version and prove it."""
        return await self._started().engine.sync(update)

    # A sync in steps, for vLLM's native transfers: `NativePublisher` drives them.

    async def open_transfer(self, init_info: dict[str, Any]) -> None:
        await self._vllm().open_transfer(init_info)

    async def begin_update(self, manifest: WeightManifest) -> None:
        await self._vllm().begin_update(manifest)

    async def receive(self, update_info: Any) -> None:
        await self._vllm().receive(update_info)

    async def finish_update(self, manifest: WeightManifest) -> SyncReport:
        return await self._vllm().finish_update(manifest)

    async def counters(self) -> dict[str, float]:
        return self._started().counters()

    async def close(self) -> None:
        if self._worker is not None:
            await self._worker.engine.close()

    def _started(self) -> RolloutWorker:
        if self._worker is None:
            raise RuntimeError(f"rollout worker {self._name} was used before start()")
        return self._worker

    def _vllm(self) -> VllmEngine:
        engine = self._started().engine
        if not isinstance(engine, VllmEngine):
            raise RuntimeError(
                f"rollout worker {self._name} has no vLLM engine: use weights.transfer='object_store'"
            )
        return engine


@ray.remote
def demonstrate(play: Callable[[], list[pa.RecordBatch]]) -> list[pa.RecordBatch]:
    """Play demonstrations somewhere in the cluster; the rows stay in the object store."""
    return play()
