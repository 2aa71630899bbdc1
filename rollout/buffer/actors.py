"""The replay buffer as a Ray actor."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from functools import wraps
from inspect import iscoroutinefunction
from typing import Any

import pyarrow as pa
import ray

from rollout.buffer.replay_buffer import ReplayBuffer
from rollout.buffer.replay_store import EpisodeRow
from rollout.wire.notices import collected
from rollout.wire.partition import WHOLE, Partition
from rollout.wire.process_info import ProcessInfo, here, stacks
from rollout.wire.trajectory import Assignment, DropReason, Slot


class ReplayBufferActor:
    """One `ReplayBuffer` as an actor, with all of its public coroutines as methods (see below the class).

    They wait inside of the replay buffer, so that all workers are served at once. Every method may be repeated when its
    answer is lost: Ray restarts the actor and repeats the calls under way.
    """

    def __init__(self, build: Callable[[], ReplayBuffer]) -> None:
        self._notices = collected()
        self._replay_buffer = build()

    async def ping(self) -> ProcessInfo:
        """Address of this actor's process; the answer shows that its event loop runs. Raises Fenced."""
        self._replay_buffer.require_sole()
        return here(ray.get_runtime_context().get_node_id())

    async def notices(self) -> list[str]:
        """Notices of this process since its start, see `rollout.wire.notices`."""
        return self._notices.since(0)

    async def stacks(self) -> str:
        """Stacks of all threads and tasks of the actor."""
        return stacks()


def _forwarded(method: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    @wraps(method)
    async def call(self: ReplayBufferActor, *arguments: Any, **keywords: Any) -> Any:
        return await method(self._replay_buffer, *arguments, **keywords)

    return call


for _name, _method in vars(ReplayBuffer).items():
    if iscoroutinefunction(_method) and not _name.startswith("_"):
        setattr(ReplayBufferActor, _name, _forwarded(_method))


class RemoteReplayBuffer:
    """The replay buffer's interface over a handle of its actor; payloads travel through the object store.

    With the actor's `max_task_retries` Ray repeats a call to the restarted actor.
    """

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    async def reserve(self, worker: str, worker_loop: int) -> Assignment | None:
        assignment: Assignment | None = await self._actor.reserve.remote(worker, worker_loop)
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

    async def gather(self, version: int, timeout_s: float) -> None:
        await self._actor.gather.remote(version, timeout_s)

    async def discard(self, version: int, reason: DropReason) -> None:
        await self._actor.discard.remote(version, reason)

    async def checkpointed(self, version: int) -> None:
        await self._actor.checkpointed.remote(version)

    async def archive(self, name: str, batches: Sequence[pa.RecordBatch]) -> None:
        await self._actor.archive.remote(name, list(batches))

    async def counts(self) -> dict[str, int]:
        counts: dict[str, int] = await self._actor.counts.remote()
        return counts
