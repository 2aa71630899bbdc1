"""The ranks of a learner after the first: each does what rank 0's loop tells all of them, and nothing by itself.

A verb that fails everywhere alike (a batch that is refused, a disk that is full) is rank 0's to report.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import pyarrow as pa

from learner.data.batch_checks import BatchRefused
from learner.parallel.ranks import touching
from learner.training.learner import Learner
from learner.training.loop import Source, begin_stage, to_its_end
from learner.training.publish import take_snapshot
from rollout.wire.schema import decode


class Follower:
    """Joins a rank's `Learner` to the source of its share. One verb at a time, in the order of rank 0."""

    def __init__(self, learner: Learner, source: Source, engine_dtype: str, take_seconds: float) -> None:
        self._learner = learner
        self._source = source
        self._engine_dtype = engine_dtype
        self._take_seconds = take_seconds
        self._batches: Sequence[pa.RecordBatch] = ()

    async def take(self, version: int) -> None:
        """Fetch the own share of the step after `version`."""
        self._batches = await self._source.take(version, self._take_seconds, self._learner.ranks.share)

    async def step(self, step: int) -> None:
        """Learn from it: the version becomes `step`."""
        if self._learner.version + 1 != step:
            raise ValueError(
                f"step {step} was asked of a rank that stands at version {self._learner.version}"
            )
        groups = [decode(batch) for batch in self._batches]
        self._batches = ()
        with suppress(BatchRefused):
            await self._do(self._learner.step, groups)

    async def snapshot(self) -> None:
        """Take part in a snapshot: the bytes are rank 0's."""
        await self._do(
            take_snapshot, self._learner.policy, self._learner.published_version, self._engine_dtype
        )

    async def save(self, run_folder: Path) -> None:
        """Take part in a checkpoint: rank 0 writes it."""
        await self._do(self._learner.save, run_folder)

    async def begin_stage(self, index: int, batches: Sequence[pa.RecordBatch]) -> None:
        """Begin a stage on all its groups, of which every step takes its part."""
        await self._do(begin_stage, self._learner, index, batches)

    async def advance_stage(self, steps: int) -> None:
        """Make up to so many steps of it."""
        await self._do(self._learner.advance_stage, steps)

    async def _do(self, function: Callable[..., object], *args: object) -> None:
        await to_its_end(touching, self._learner.ranks, function, *args)
