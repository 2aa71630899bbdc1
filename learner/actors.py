"""The learner as a Ray actor, and weights published through Ray's object store."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from learner.learner import Learner
from learner.loop import LearnerLoop, Row
from learner.publish import Publisher, Snapshot
from rollout.wire.actors import RemoteExchange, put_object
from rollout.wire.weights import SyncReport, WeightUpdate


class ObjectStorePublisher:
    """Puts a version into the object store once and has every engine load it from there."""

    needs_bytes = True

    def __init__(self, engines: dict[str, Any], sync_seconds: float) -> None:
        self._engines = engines
        self._sync_seconds = sync_seconds

    async def publish(self, snapshot: Snapshot) -> Sequence[SyncReport]:
        handle, _keep_alive = await asyncio.to_thread(put_object, snapshot.arrays)
        update = WeightUpdate(snapshot.manifest, handle)
        return await asyncio.gather(
            *(self._sync(name, engine, update) for name, engine in self._engines.items())
        )

    async def _sync(self, name: str, engine: Any, update: WeightUpdate) -> SyncReport:
        try:
            report: SyncReport = await asyncio.wait_for(engine.sync.remote(update), self._sync_seconds)
        except TimeoutError:
            raise TimeoutError(
                f"rollout worker {name} did not load weight version {update.version} within {self._sync_seconds:g} s"
            ) from None
        return report


class LearnerActor:
    """`build()` makes the learner where the actor runs; `make_publisher(learner, engines)` how its weights travel."""

    def __init__(
        self,
        build: Callable[[], Learner],
        exchange: Any,
        make_publisher: Callable[[Learner], Publisher],
        engine_dtype: str,
        take_seconds: float,
        keep_checkpoints: int,
    ) -> None:
        self._learner = build()
        source = RemoteExchange(exchange)
        publisher = make_publisher(self._learner)
        self._loop = LearnerLoop(
            self._learner, source, publisher, engine_dtype, take_seconds, keep_checkpoints
        )

    async def start(self, run_folder: Path, resume: bool) -> tuple[str, int]:
        """Load the newest checkpoint when resuming; returns the host and the version the learner stands at."""
        if resume:
            self._learner.load(run_folder)
        return socket.gethostname(), self._learner.version

    async def begin_imitation(self, batches: list[pa.RecordBatch]) -> int:
        return self._loop.begin_imitation(batches)

    async def imitate(self, steps: int) -> list[Row]:
        return await asyncio.to_thread(self._loop.imitate, steps)

    async def publish(self) -> Row:
        return await self._loop.publish()

    async def step(self) -> Row:
        return await self._loop.step()

    async def save(self, run_folder: Path) -> None:
        await self._loop.save(run_folder)
