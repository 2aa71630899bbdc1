"""The exchange as a Ray actor, and Ray's object store as a place where weights lie."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa
import ray

from rollout.wire.exchange import Exchange
from rollout.wire.notices import collected
from rollout.wire.share import WHOLE, Share
from rollout.wire.stacks import stacks
from rollout.wire.store import EpisodeRow
from rollout.wire.trajectory import Assignment, DropReason, Slot
from rollout.wire.weights import ByteArray, Handle, joined, parts
from rollout.wire.whereabouts import Whereabouts, here


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

    async def release(self, version: int) -> None:
        await self._actor.release.remote(version)

    async def landed(self, version: int) -> None:
        await self._actor.landed.remote(version)

    async def rollback(self, version: int) -> None:
        await self._actor.rollback.remote(version)

    async def archive(self, name: str, batches: Sequence[pa.RecordBatch]) -> None:
        await self._actor.archive.remote(name, list(batches))

    async def counts(self) -> dict[str, int]:
        counts: dict[str, int] = await self._actor.counts.remote()
        return counts

    async def state(self) -> dict[str, Any]:
        state: dict[str, Any] = await self._actor.state.remote()
        return state

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
