"""The exchange as a Ray actor, and Ray's object store as a place where weights lie."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa
import ray

from rollout.wire.exchange import Exchange
from rollout.wire.store import EpisodeRow
from rollout.wire.trajectory import DropReason, Slot
from rollout.wire.weights import ByteArray, Handle, joined, parts


class ExchangeActor:
    """Hosts one `Exchange`. Every method waits inside the exchange, so the actor serves all workers at once."""

    def __init__(self, build: Callable[[], Exchange]) -> None:
        self._exchange = build()

    async def reserve(self, worker: str) -> Slot | None:
        return await self._exchange.reserve(worker)

    async def add(self, slot: Slot, batch: pa.RecordBatch, episodes: Sequence[EpisodeRow]) -> None:
        await self._exchange.add(slot, batch, episodes)

    async def drop(
        self, slot: Slot, reason: DropReason, error: str = "", episodes: Sequence[EpisodeRow] = ()
    ) -> None:
        await self._exchange.drop(slot, reason, error, episodes)

    async def take(self, timeout_s: float) -> list[pa.RecordBatch]:
        return await self._exchange.take(timeout_s)

    async def release(self, version: int) -> None:
        await self._exchange.release(version)

    async def landed(self, version: int) -> None:
        await self._exchange.landed(version)

    async def recover(self, version: int) -> None:
        await self._exchange.recover(version)

    async def archive(self, name: str, batches: Sequence[pa.RecordBatch]) -> None:
        await self._exchange.archive(name, batches)

    async def counts(self) -> dict[str, int]:
        return await self._exchange.counts()

    async def close(self) -> None:
        await self._exchange.close()


class RemoteExchange:
    """The exchange's interface over a handle of its actor; payloads travel through the object store."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    async def reserve(self, worker: str) -> Slot | None:
        slot: Slot | None = await self._actor.reserve.remote(worker)
        return slot

    async def add(self, slot: Slot, batch: pa.RecordBatch, episodes: Sequence[EpisodeRow]) -> None:
        await self._actor.add.remote(slot, batch, list(episodes))

    async def drop(
        self, slot: Slot, reason: DropReason, error: str = "", episodes: Sequence[EpisodeRow] = ()
    ) -> None:
        await self._actor.drop.remote(slot, reason, error, list(episodes))

    async def take(self, timeout_s: float) -> list[pa.RecordBatch]:
        batches: list[pa.RecordBatch] = await self._actor.take.remote(timeout_s)
        return batches

    async def release(self, version: int) -> None:
        await self._actor.release.remote(version)

    async def landed(self, version: int) -> None:
        await self._actor.landed.remote(version)

    async def recover(self, version: int) -> None:
        await self._actor.recover.remote(version)

    async def archive(self, name: str, batches: Sequence[pa.RecordBatch]) -> None:
        await self._actor.archive.remote(name, list(batches))

    async def counts(self) -> dict[str, int]:
        counts: dict[str, int] = await self._actor.counts.remote()
        return counts

    async def close(self) -> None:
        await self._actor.close.remote()


def put_object(arrays: Sequence[ByteArray]) -> tuple[Handle, ray.ObjectRef]:
    """Put the arrays into the object store as one run of bytes: one copy for every engine of a host.

    The caller keeps the reference until every engine has acknowledged; the handle alone does not keep the object alive.
    """
    reference = ray.put(joined(arrays))
    cluster = ray.get_runtime_context().gcs_address
    packed = base64.b64encode(ray.cloudpickle.dumps(reference)).decode()
    # Ray keeps for ever what is pickled outside of its own calls, which would be every version of a run. The caller's
    # reference is the one that counts, so what Ray has just added is taken back.
    ray._private.worker.global_worker.core_worker.remove_object_ref_reference(reference)
    return Handle("rollout.wire.actors:open_object", f"{cluster} {packed}"), reference


def open_object(address: str, sizes: Sequence[int]) -> list[ByteArray]:
    """Map the arrays where they lie: read-only views of the object store's memory.

    vLLM's worker process is no Ray process: the first call there joins the cluster (about 0.1 s, once).
    """
    cluster, _, packed = address.partition(" ")
    if not ray.is_initialized():
        ray.init(address=cluster, log_to_driver=False, logging_level="ERROR")
    return parts(ray.get(ray.cloudpickle.loads(base64.b64decode(packed)), timeout=60), sizes)
