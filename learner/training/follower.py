"""The ranks of a learner after the first: each does what rank 0's loop tells all of them, and nothing by itself.

A verb that fails everywhere alike (a batch that is refused, a disk that is full) is rank 0's to report.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import pyarrow as pa
import torch

from learner.data.batch_checks import BatchRefused
from learner.parallel.ranks import RankLost, touching
from learner.training.checkpoint_writing import DiskFull, Saving
from learner.training.device_state import DeviceState
from learner.training.learner import Learner
from learner.training.loop import Source, begin_stage, to_its_end
from learner.training.publish import take_snapshot
from rollout.wire.schema import decode

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Follower:
    """Joins a rank's `Learner` to the source of its share. One verb at a time, in the order of rank 0."""

    def __init__(self, learner: Learner, source: Source, engine_dtype: str, take_seconds: float) -> None:
        self._learner = learner
        self._state = DeviceState(learner)
        self._source = source
        self._engine_dtype = engine_dtype
        self._take_seconds = take_seconds
        self._batches: Sequence[pa.RecordBatch] = ()
        self._copied: Saving | None = None  # a checkpoint that is not on disk yet
        self._landing: asyncio.Task[None] | None = None  # of the last one

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
        await self._snapshot(with_bytes=True)

    async def manifest(self) -> None:
        """Take part in a snapshot without bytes."""
        await self._snapshot(with_bytes=False)

    async def _snapshot(self, with_bytes: bool) -> None:
        learner = self._learner
        words = learner.policy, learner.published_version, self._engine_dtype, with_bytes
        await self._do(take_snapshot, *words)

    async def send(self) -> None:
        """Take part in gathering the weights, layer by layer, which rank 0 sends to the engines."""
        dtype = getattr(torch, self._engine_dtype)
        await self._do(deque, self._learner.policy.named_weights(dtype), 0)

    async def copy(self, run_folder: Path) -> None:
        """Copy the own part of a checkpoint, once the one before is written."""
        if self._landing is not None:
            await asyncio.wait([self._landing])
        self._copied = await self._do(self._learner.begin_save, run_folder)

    async def land(self) -> None:
        """Write the copy, meanwhile."""
        assert self._copied is not None, "rank 0 says `copy` first"
        self._landing = asyncio.create_task(self._land(self._copied))

    async def offload(self) -> None:
        """Take the own state to host memory."""
        await self._do(self._state.offload)

    async def onload(self) -> None:
        """Bring it back."""
        await self._do(self._state.onload)

    async def _land(self, saving: Saving) -> None:
        try:
            await self._do(saving.land)
            self._copied = None
        except (OSError, DiskFull, RankLost) as error:  # which rank 0 hears as well
            logger.warning("the own part of a checkpoint was not written: %s", error)

    async def begin_stage(self, index: int, batches: Sequence[pa.RecordBatch]) -> None:
        """Begin a stage on all its groups, of which every step takes its part."""
        await self._do(begin_stage, self._learner, index, batches)

    async def advance_stage(self, steps: int) -> None:
        """Make up to so many steps of it."""
        await self._do(self._learner.advance_stage, steps)

    async def _do(self, function: Callable[..., T], *args: object) -> T:
        return await to_its_end(touching, self._learner.ranks, function, *args)
