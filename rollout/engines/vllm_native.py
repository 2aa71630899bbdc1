"""Weights from the learner's GPU to the engines' through vLLM's own transfers: "nccl" (broadcast), "ipc" (one GPU).

    publish -> send_weights (vLLM, in a thread) -> start | update | finish -> one actor call to every engine

"nccl" is for engines on separate GPUs, "ipc" for engines of one GPU each that share the learner's. A sync ends with the
same proof as one through the object store (names, version, probe), except for checksums: the tensors never leave device
memory, so that only the probe verifies their content.

The engines of a transfer are a group, which is made again when others are to take part. A transfer that fails leaves
the group: its engines may hold half a version, until one comes by a handle (vllm_weights.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo
from vllm.utils.network_utils import get_open_port

from rollout.wire.weights import (
    SyncReport,
    TensorSpec,
    TransferFailed,
    TransferStuck,
    WeightManifest,
    WeightMismatch,
)

NamedWeights = Callable[[], Iterable[tuple[str, torch.Tensor]]]

_LEAVE_SECONDS = 30.0  # for a transfer to end whose group was left


class Versioned(Protocol):
    """A snapshot, of which only the manifest is read here."""

    @property
    def manifest(self) -> WeightManifest: ...


class LiveSource(WeightSource):
    """The learner's current parameters, cast one at a time to the dtypes of the manifest (`specs`).

    Other ranks of the learner gather them together with this one, all of them: `rest` takes what a transfer left.
    """

    def __init__(self, named_weights: NamedWeights) -> None:
        self.specs: tuple[TensorSpec, ...] = ()
        self._named_weights = named_weights
        self._under_way: Iterator[tuple[str, torch.Tensor]] | None = None

    def open(self, specs: tuple[TensorSpec, ...]) -> None:
        """Be the source of one transfer."""
        self.specs, self._under_way = specs, iter(self._named_weights())

    def rest(self) -> None:
        """Take the tensors that the transfer has not taken."""
        for _ in self._under_way or ():
            pass

    def metadata(self) -> list[ParamMeta]:
        return [ParamMeta(spec.name, getattr(torch, spec.dtype), spec.shape) for spec in self.specs]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        assert self._under_way is not None, "opened for the transfer"
        for meta, (name, tensor) in zip(self.metadata(), self._under_way, strict=True):
            yield name, tensor.detach().to(meta.dtype)


@dataclass
class Round:
    """One transfer of a version: the current call, the engines that have not answered it, and the result."""

    manifest: WeightManifest
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    over: asyncio.Event = field(default_factory=asyncio.Event)  # the transfer returned, failed, or time is up
    doing: str = ""
    calls: dict[str, asyncio.Future[Any]] = field(default_factory=dict)
    failure: Exception | None = None
    reports: list[SyncReport] = field(default_factory=list)

    def overdue(self, limit_s: float) -> str:
        """Error message with the engines that have not answered."""
        silent = ", ".join(name for name, call in self.calls.items() if not call.done())
        who, what = (silent, self.doing) if silent else ("the learner's GPU", "finish sending")
        return f"{who} did not {what} weight version {self.manifest.version} within {limit_s:g} s"

    def close(self) -> None:
        """End the round: release threads that wait for an engine, and block further calls."""
        self.over.set()
        for call in self.calls.values():
            call.cancel()


class EngineCalls:
    """vLLM's weight-sync client over rollout actors: four blocking calls, each to all engines of a group at once.

    vLLM calls from the transfer's threads; the actor calls run on the learner's event loop. A failed call ends the
    round at once, since with nccl the transfer's main thread may then wait for a peer forever.
    """

    round: Round  # of the version under way, set before the transfer starts

    def __init__(
        self, native: str, workers: Mapping[str, Any], gpus_per_engine: int, receive_seconds: float
    ) -> None:
        self.workers = dict(workers)
        self._native = native
        self._gpus_per_engine = gpus_per_engine
        self._receive_seconds = receive_seconds

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        def join(position: int, worker: Any) -> Any:
            own = dict(init_info)
            if (
                "rank_offset" in own
            ):  # each engine counts its ranks from 0; together they follow the learner's 0
                own["rank_offset"] += position * self._gpus_per_engine
            return worker.open_transfer.remote(
                {"native": self._native, "info": own, "seconds": self._receive_seconds}
            )

        self._all("join the transfer of", join)

    def start_weight_update(self) -> None:
        self._all("pause for", lambda _, worker: worker.begin_update.remote(self.round.manifest))

    def update_weights(self, update_info: Any) -> None:
        self._all("load", lambda _, worker: worker.receive.remote(update_info))

    def finish_weight_update(self, weight_version: str | None = None) -> None:  # trainers pass none
        manifest = self.round.manifest
        self.round.reports = self._all("prove", lambda _, worker: worker.finish_update.remote(manifest))

    def _all(self, doing: str, call: Callable[[int, Any], Any]) -> list[Any]:
        return asyncio.run_coroutine_threadsafe(
            self._answers(self.round, doing, call), self.round.loop
        ).result()

    async def _answers(self, current: Round, doing: str, call: Callable[[int, Any], Any]) -> list[Any]:
        if current.over.is_set():
            raise TransferFailed(f"the transfer of weight version {current.manifest.version} was aborted")
        current.doing = doing
        current.calls = {
            name: asyncio.ensure_future(call(position, worker))
            for position, (name, worker) in enumerate(self.workers.items())
        }
        await asyncio.wait(current.calls.values(), return_when=asyncio.FIRST_EXCEPTION)
        for name, answer in current.calls.items():
            if answer.done() and (error := answer.exception()):
                current.failure = _named(name, f"{doing} weight version {current.manifest.version}", error)
                current.close()
                raise current.failure
        return [answer.result() for answer in current.calls.values()]


class NativePublisher:
    """Publishes the learner's live parameters (`learner.training.publish.Publisher`), GPU to GPU.

    address: of the learner's host. receive_seconds: a transfer of one version takes at most; engines then leave the
    group by themselves. sync_timeout_seconds: all of a sync.
    """

    def __init__(
        self,
        transfer: Literal["nccl", "ipc"],
        named_weights: NamedWeights,
        gpus_per_engine: int,
        address: str,
        receive_seconds: float,
        sync_timeout_seconds: float,
    ) -> None:
        self._transfer = transfer
        self._source = LiveSource(named_weights)
        self._gpus_per_engine = gpus_per_engine
        self._address = address
        self._receive_seconds = receive_seconds
        self._sync_timeout_seconds = sync_timeout_seconds
        self._engines: EngineCalls | None = None  # of the present group
        self._trainer: Any = None  # vLLM's, for this group, once all have joined
        self._thread = _one_thread()

    async def publish(self, snapshot: Versioned, workers: Mapping[str, Any]) -> Sequence[SyncReport]:
        """Send the parameters to every engine; workers: handles of their rollout actors, by name.

        Raises WeightMismatch, and TransferFailed with the engine's name: the group is then left, and the next call
        makes another one. Raises TransferStuck where the learner's GPU does not let go of it.
        """
        if self._engines is None or list(self._engines.workers) != list(workers):
            await self._leave()
            self._engines = EngineCalls(self._transfer, workers, self._gpus_per_engine, self._receive_seconds)
        current = self._engines.round = Round(snapshot.manifest)
        self._source.open(snapshot.manifest.tensors)
        sending = self._thread.submit(self._send, self._engines)
        sending.add_done_callback(lambda _: current.loop.call_soon_threadsafe(current.over.set))
        try:
            await asyncio.wait_for(current.over.wait(), self._sync_timeout_seconds)
        except TimeoutError:
            current.failure = TransferFailed(current.overdue(self._sync_timeout_seconds))
        finally:
            current.close()
        if current.failure is None and (error := sending.exception()):
            current.failure = TransferFailed(f"the learner could not send: {error}")
            current.failure.__cause__ = error
        if current.failure is not None:
            await self._give_up(sending, current.failure)
            raise current.failure
        return current.reports

    async def _give_up(self, sending: Future[None], failure: Exception) -> None:
        """Leave the group, and take part to the end in what the learner's ranks gather."""
        joined = self._trainer is not None
        await self._leave()
        ended, _ = await asyncio.wait([asyncio.wrap_future(sending)], timeout=_LEAVE_SECONDS)
        for each in ended:
            each.exception()  # the failure is known
        if not ended and joined:
            raise TransferStuck(f"the learner's GPU does not let go of a transfer: {failure}") from failure
        if not ended:  # it waits for engines to join, and has no tensor yet
            self._thread.shutdown(wait=False)
            self._thread = _one_thread()
        await asyncio.to_thread(self._source.rest)

    async def _leave(self) -> None:
        trainer, self._trainer, self._engines = self._trainer, None, None
        if trainer is not None:
            await asyncio.to_thread(trainer.shutdown)  # ends collective calls under way

    def _send(self, engines: EngineCalls) -> None:
        if self._trainer is None:
            trainer = self._open(engines)
            if engines.round.over.is_set():
                trainer.shutdown()
                raise TransferFailed("the engines have joined too late")
            self._trainer = trainer
        self._trainer.send_weights()  # calls start, update and finish of EngineCalls

    def _open(self, engines: EngineCalls) -> Any:
        if self._transfer == "nccl":
            ranks = 1 + len(engines.workers) * self._gpus_per_engine
            info = NCCLTrainerInitInfo(self._address, get_open_port(), ranks, rank=0)
        else:
            # Packed: one buffer is shared instead of a cast copy of the whole model. No tensor may exceed it.
            largest = max(spec.nbytes for spec in self._source.specs)
            size = max(largest, IPCTrainerInitInfo.packed_buffer_size_bytes)
            info = IPCTrainerInitInfo(packed=True, packed_buffer_size_bytes=size, rank=0)
        return WeightTransferTrainerFactory.trainer_init(info, client=engines, source=self._source)


def _one_thread() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix="weights")


def _named(name: str, doing: str, error: BaseException) -> Exception:
    if isinstance(error, WeightMismatch):
        return error  # its message names engine and tensor
    # The text of a remote error is a traceback: its last line has the message.
    reason = str(error).strip().rpartition("\n")[2] or type(error).__name__
    failure = TransferFailed(f"{name} could not {doing}: {reason}")
    failure.__cause__ = error
    return failure
