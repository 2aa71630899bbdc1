"""The replay buffer as a Ray actor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa
import ray

from rollout.buffer.replay_buffer import ReplayBuffer
from rollout.buffer.replay_store import EpisodeRow
from rollout.wire.notices import collected
from rollout.wire.partition import WHOLE, Partition
from rollout.wire.process_info import ProcessInfo, here
from rollout.wire.stacks import stacks
from rollout.wire.trajectory import Assignment, DropReason, Slot


class ReplayBufferActor:
    """Hosts one `ReplayBuffer`. Every method waits inside the replay buffer, so the actor serves all workers at once.

    Every method may be called again when its answer is lost: whoever makes the actor lets Ray restart it and repeat the
    calls that were under way.
    """

    def __init__(self, build: Callable[[], ReplayBuffer]) -> None:
        self._notices = collected()
        self._replay_buffer = build()

    async def reserve(self, worker: str, lane: int) -> Assignment | None:
        return await self._replay_buffer.reserve(worker, lane)

    async def record_turns(self, batch: pa.RecordBatch) -> None:
        await self._replay_buffer.record_turns(batch)

    async def add(self, slot: Slot, batch: pa.RecordBatch, episodes: Sequence[EpisodeRow]) -> None:
        await self._replay_buffer.add(slot, batch, episodes)

    async def drop(
        self, slot: Slot, reason: DropReason, error: str = "", episodes: Sequence[EpisodeRow] = ()
    ) -> None:
        await self._replay_buffer.drop(slot, reason, error, episodes)

    async def reassign(self, worker: str, lost: str = "") -> int:
        return await self._replay_buffer.reassign(worker, lost)

    async def take(self, version: int, timeout_s: float, share: Partition = WHOLE) -> list[pa.RecordBatch]:
        return await self._replay_buffer.take(version, timeout_s, share)

    async def discard(self, version: int, reason: DropReason) -> None:
        await self._replay_buffer.discard(version, reason)

    async def release(self, version: int) -> None:
        await self._replay_buffer.release(version)

    async def checkpointed(self, version: int) -> None:
        await self._replay_buffer.checkpointed(version)

    async def rollback(self, version: int, new_driver: bool = False) -> None:
        await self._replay_buffer.rollback(version, new_driver)

    async def archive(self, name: str, batches: Sequence[pa.RecordBatch]) -> None:
        await self._replay_buffer.archive(name, batches)

    async def counts(self) -> dict[str, int]:
        return await self._replay_buffer.counts()

    async def state(self) -> dict[str, Any]:
        return await self._replay_buffer.state()

    async def ping(self) -> ProcessInfo:
        """Where this actor runs, said when its event loop has come round to it."""
        return here(ray.get_runtime_context().get_node_id())

    async def notices(self) -> list[str]:
        """What this process has noticed since it was started, see `rollout.wire.notices`."""
        return self._notices.since(0)

    async def stacks(self) -> str:
        """What every thread and task of the actor is doing."""
        return stacks()

    async def close(self) -> None:
        await self._replay_buffer.close()


class RemoteReplayBuffer:
    """The replay buffer's interface over a handle of its actor; payloads travel through the object store.

    A call outlives the replay buffer's process: with the actor's `max_task_retries` Ray repeats it to the next one.
    """

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    async def reserve(self, worker: str, lane: int) -> Assignment | None:
        assignment: Assignment | None = await self._actor.reserve.remote(worker, lane)
        return assignment

    async def record_turns(self, batch: pa.RecordBatch) -> None:
        await self._actor.record_turns.remote(batch)

    async def add(self, slot: Slot, batch: pa.RecordBatch, episodes: Sequence[EpisodeRow]) -> None:
        await self._actor.add.remote(slot, batch, list(episodes))

    async def drop(
        self, slot: Slot, reason: DropReason, error: str = "", episodes: Sequence[EpisodeRow] = ()
    ) -> None:
        await self._actor.drop.remote(slot, reason, error, list(episodes))

    async def reassign(self, worker: str) -> int:
        return int(await self._actor.reassign.remote(worker))

    async def take(self, version: int, timeout_s: float, share: Partition = WHOLE) -> list[pa.RecordBatch]:
        batches: list[pa.RecordBatch] = await self._actor.take.remote(version, timeout_s, share)
        return batches

    async def discard(self, version: int, reason: DropReason) -> None:
        await self._actor.discard.remote(version, reason)

    async def checkpointed(self, version: int) -> None:
        await self._actor.checkpointed.remote(version)

    async def archive(self, name: str, batches: Sequence[pa.RecordBatch]) -> None:
        await self._actor.archive.remote(name, list(batches))

    async def counts(self) -> dict[str, int]:
        counts: dict[str, int] = await self._actor.counts.remote()
        return counts
