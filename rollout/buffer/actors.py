"""The exchange as a Ray actor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa
import ray

from rollout.buffer.replay_buffer import Exchange
from rollout.buffer.replay_store import EpisodeRow
from rollout.wire.notices import collected
from rollout.wire.partition import WHOLE, Share
from rollout.wire.process_info import Whereabouts, here
from rollout.wire.stacks import stacks
from rollout.wire.trajectory import Assignment, DropReason, Slot


class ExchangeActor:
    """Hosts one `Exchange`. Every method waits inside the exchange, so the actor serves all workers at once.

    Every method may be called again when its answer is lost: whoever makes the actor lets Ray restart it and repeat the
    calls that were under way.
    """

    def __init__(self, build: Callable[[], Exchange]) -> None:
        self._notices = collected()
        self._exchange = build()

    async def reserve(self, worker: str, lane: int) -> Assignment | None:
        return await self._exchange.reserve(worker, lane)

    async def record_turns(self, batch: pa.RecordBatch) -> None:
        await self._exchange.record_turns(batch)

    async def add(self, slot: Slot, batch: pa.RecordBatch, episodes: Sequence[EpisodeRow]) -> None:
        await self._exchange.add(slot, batch, episodes)

    async def drop(
        self, slot: Slot, reason: DropReason, error: str = "", episodes: Sequence[EpisodeRow] = ()
    ) -> None:
        await self._exchange.drop(slot, reason, error, episodes)

    async def hand_on(self, worker: str, lost: str = "") -> int:
        return await self._exchange.hand_on(worker, lost)

    async def take(self, version: int, timeout_s: float, share: Share = WHOLE) -> list[pa.RecordBatch]:
        return await self._exchange.take(version, timeout_s, share)

    async def discard(self, version: int, reason: DropReason) -> None:
        await self._exchange.discard(version, reason)

    async def release(self, version: int) -> None:
        await self._exchange.release(version)

    async def landed(self, version: int) -> None:
        await self._exchange.landed(version)

    async def rollback(self, version: int, new_driver: bool = False) -> None:
        await self._exchange.rollback(version, new_driver)

    async def archive(self, name: str, batches: Sequence[pa.RecordBatch]) -> None:
        await self._exchange.archive(name, batches)

    async def counts(self) -> dict[str, int]:
        return await self._exchange.counts()

    async def state(self) -> dict[str, Any]:
        return await self._exchange.state()

    async def ping(self) -> Whereabouts:
        """Where this actor runs, said when its event loop has come round to it."""
        return here(ray.get_runtime_context().get_node_id())

    async def notices(self) -> list[str]:
        """What this process has noticed since it was started, see `rollout.wire.notices`."""
        return self._notices.since(0)

    async def stacks(self) -> str:
        """What every thread and task of the actor is doing."""
        return stacks()

    async def close(self) -> None:
        await self._exchange.close()


class RemoteExchange:
    """The exchange's interface over a handle of its actor; payloads travel through the object store.

    A call outlives the exchange's process: with the actor's `max_task_retries` Ray repeats it to the next one.
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

    async def hand_on(self, worker: str) -> int:
        return int(await self._actor.hand_on.remote(worker))

    async def take(self, version: int, timeout_s: float, share: Share = WHOLE) -> list[pa.RecordBatch]:
        batches: list[pa.RecordBatch] = await self._actor.take.remote(version, timeout_s, share)
        return batches

    async def discard(self, version: int, reason: DropReason) -> None:
        await self._actor.discard.remote(version, reason)

    async def landed(self, version: int) -> None:
        await self._actor.landed.remote(version)

    async def archive(self, name: str, batches: Sequence[pa.RecordBatch]) -> None:
        await self._actor.archive.remote(name, list(batches))

    async def counts(self) -> dict[str, int]:
        counts: dict[str, int] = await self._actor.counts.remote()
        return counts
