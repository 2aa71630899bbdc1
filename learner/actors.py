"""The learner as a Ray actor; its versions lie in Ray's object store."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray

from learner.learner import Learner
from learner.loop import LearnerLoop, Row
from learner.publish import Publisher, Snapshot
from rollout.wire.actors import RemoteExchange, put_object
from rollout.wire.stacks import stacks
from rollout.wire.weights import Handle, WeightUpdate
from rollout.wire.whereabouts import Whereabouts, here


class LearnerActor:
    """`build()` makes the learner where the actor runs.

    `make_native(learner)` gives it vLLM's own transfer, for a run whose weights travel that way.
    """

    def __init__(
        self,
        build: Callable[[], Learner],
        exchange: Any,
        engine_dtype: str,
        take_seconds: float,
        keep_checkpoints: int,
        make_native: Callable[[Learner], Publisher] | None = None,
    ) -> None:
        self._learner = build()
        self._loop = LearnerLoop(
            self._learner,
            RemoteExchange(exchange),
            _place,
            engine_dtype,
            take_seconds,
            keep_checkpoints,
            make_native(self._learner) if make_native else None,
        )

    async def start(self, run_folder: Path, resume: bool) -> tuple[Whereabouts, int]:
        """Load the newest checkpoint when resuming; returns where this actor runs and its version."""
        if resume:
            self._learner.load(run_folder)
        return here(ray.get_runtime_context().get_node_id()), self._learner.version

    async def begin_imitation(self, batches: list[pa.RecordBatch]) -> int:
        return self._loop.begin_imitation(batches)

    async def imitate(self, steps: int) -> list[Row]:
        return await self._loop.imitate(steps)

    async def train(self, step: int) -> Row:
        return await self._loop.train(step)

    async def offer(self) -> WeightUpdate:
        return await self._loop.offer()

    async def withdraw(self) -> None:
        await self._loop.withdraw()

    async def publish_native(self) -> Row:
        return await self._loop.publish_native()

    async def save(self, run_folder: Path) -> None:
        await self._loop.save(run_folder)

    async def ping(self) -> None:
        """Answers while the event loop does; a step runs in a thread beside it."""

    async def stacks(self) -> str:
        """What every thread and task of this process is doing."""
        return stacks()


def _place(snapshot: Snapshot) -> tuple[Handle, Any]:
    return put_object(snapshot.arrays)
