"""The learner's side of the ring: take, train, publish, release. Synchronous training is lag 0 of the same loop.

`step` waits for the source (which waits for the rollout workers), then for every engine to hold the new version. What
unblocks the workers is `release`, which comes last: only then may groups start that the new version will sample.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import pyarrow as pa

from learner.learner import Learner
from learner.publish import Publisher, Staging, take_snapshot
from rollout.wire.schema import decode

Row = dict[str, float]


class Source(Protocol):
    """Where groups come from; the exchange, near or far."""

    async def take(self, timeout_s: float) -> list[pa.RecordBatch]: ...
    async def release(self, version: int) -> None: ...
    async def landed(self, version: int) -> None: ...
    async def counts(self) -> dict[str, int]: ...


class LearnerLoop:
    """Joins a `Learner` to a source of groups and a publisher of weights."""

    def __init__(
        self,
        learner: Learner,
        source: Source,
        publisher: Publisher,
        engine_dtype: str,
        take_seconds: float,
        keep_checkpoints: int = 2,
    ) -> None:
        self._learner = learner
        self._source = source
        self._publisher = publisher
        self._engine_dtype = engine_dtype
        self._take_seconds = take_seconds
        self._keep = keep_checkpoints
        self._staging = Staging()
        self._imitation: Iterator[Row] = iter(())

    @property
    def version(self) -> int:
        return self._learner.version

    async def step(self) -> Row:
        """One learner step and one weight version; returns the step's metrics."""
        began = time.perf_counter()
        batches = await self._source.take(self._take_seconds)
        taken = time.perf_counter()
        row = await asyncio.to_thread(self._learner.step, [decode(batch) for batch in batches])
        trained = time.perf_counter()
        published = await self.publish()
        await self._source.release(self.version)
        ended = time.perf_counter()
        train_s = trained - taken
        return (
            row
            | published
            | {
                "step": self.version,
                "version": self.version,
                "wait_s": taken - began,
                "train_s": train_s,
                "publish_s": ended - trained,
                "step_s": ended - began,
                "learner_tokens_per_s": row["tokens_trained"] / train_s,
            }
        )

    async def publish(self) -> Row:
        """Bring the current version to every engine; returns when all have proved that they hold it."""
        publisher, policy = self._publisher, self._learner.policy
        # All engines hold the last version, so nobody reads the staging buffer any more.
        snapshot = await asyncio.to_thread(
            take_snapshot, policy, self.version, self._engine_dtype, publisher.needs_bytes, self._staging
        )
        reports = await publisher.publish(snapshot)
        return {
            "sync_stall_ms": 1e3 * max((report.seconds_stalled for report in reports), default=0.0),
            "probe_difference": max((report.probe_difference for report in reports), default=0.0),
        }

    def begin_imitation(self, batches: Sequence[pa.RecordBatch]) -> int:
        """Hand over demonstrations; returns how many imitation steps they make."""
        groups = [decode(batch) for batch in batches]
        self._imitation = self._learner.imitate(groups)
        return self._learner.imitation_steps(len(groups))

    def imitate(self, steps: int) -> list[Row]:
        """Up to `steps` imitation steps; fewer when the demonstrations are used up."""
        return [row for _, row in zip(range(steps), self._imitation, strict=False)]

    async def save(self, run_folder: Path) -> None:
        """Write a checkpoint; once it has landed, the groups it contains are trained for good."""
        # "issued" is where the task stream stands: group ids are its positions.
        cursor = await self._source.counts()
        await asyncio.to_thread(self._learner.save, run_folder, cursor, self._keep)
        await self._source.landed(self.version)
