"""Weights from the learner's GPU to the engines' through vLLM's own transfers: "nccl" (broadcast), "ipc" (one GPU).

    publish -> send_weights (vLLM, in a thread) -> start | update | finish -> one actor call to every engine

"nccl" is for engines on separate GPUs, "ipc" for engines of one GPU each that share the learner's. A sync ends with the
same proof as one through the object store (names, version, probe), except for checksums: the tensors never leave device
memory, so that only the probe verifies their content.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo
from vllm.utils.network_utils import get_open_port

from rollout.wire.weights import SyncReport, TensorSpec, WeightManifest, WeightMismatch

NamedWeights = Callable[[], Iterable[tuple[str, torch.Tensor]]]


class TransferFailed(RuntimeError):
    """An engine could not take part in a transfer; the message names it."""


class Versioned(Protocol):
    """A snapshot, of which only the manifest is read here."""

    @property
    def manifest(self) -> WeightManifest: ...


class LiveSource(WeightSource):
    """The learner's current parameters, cast one at a time to the dtypes of the manifest (`specs`)."""

    def __init__(self, named_weights: NamedWeights) -> None:
        self.specs: tuple[TensorSpec, ...] = ()
        self._named_weights = named_weights

    def metadata(self) -> list[ParamMeta]:
        return [ParamMeta(spec.name, getattr(torch, spec.dtype), spec.shape) for spec in self.specs]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for meta, (name, tensor) in zip(self.metadata(), self._named_weights(), strict=True):
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
    """vLLM's weight-sync client over rollout actors: four blocking calls, each to all engines at once.

    vLLM calls from the transfer's threads; the actor calls run on the learner's event loop. A failed call ends the
    round at once, since with nccl the transfer's main thread may then wait for a peer forever.
    """

    round: Round  # of the version under way, set before the transfer starts

    def __init__(self, workers: dict[str, Any], gpus_per_engine: int) -> None:
        self._workers = workers
        self._gpus_per_engine = gpus_per_engine

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        def join(position: int, worker: Any) -> Any:
            own = dict(init_info)
            if (
                "rank_offset" in own
            ):  # each engine counts its ranks from 0; together they follow the learner's 0
                own["rank_offset"] += position * self._gpus_per_engine
            return worker.open_transfer.remote(own)

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
            for position, (name, worker) in enumerate(self._workers.items())
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

    workers: handles of rollout actors by name. address: of the learner's host. After an error the engines stay paused,
    and the transfer's thread may hang in a collective: the run must end its actors.
    """

    def __init__(
        self,
        transfer: Literal["nccl", "ipc"],
        named_weights: NamedWeights,
        workers: dict[str, Any],
        gpus_per_engine: int,
        address: str,
        sync_timeout_seconds: float,
    ) -> None:
        self._transfer = transfer
        self._engines = EngineCalls(workers, gpus_per_engine)
        self._source = LiveSource(named_weights)
        self._world_size = 1 + len(workers) * gpus_per_engine
        self._address = address
        self._sync_timeout_seconds = sync_timeout_seconds
        self._trainer: Any = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="weights")

    async def publish(self, snapshot: Versioned) -> Sequence[SyncReport]:
        """Send the parameters to every engine. WeightMismatch, TransferFailed and TimeoutError name the engine."""
        current = self._engines.round = Round(snapshot.manifest)
        sending = self._thread.submit(self._send, snapshot.manifest)
        sending.add_done_callback(lambda _: current.loop.call_soon_threadsafe(current.over.set))
        try:
            await asyncio.wait_for(current.over.wait(), self._sync_timeout_seconds)
        except TimeoutError:
            raise TimeoutError(current.overdue(self._sync_timeout_seconds)) from None
        finally:
            current.close()
        if current.failure:
            raise current.failure
        sending.result()
        return current.reports

    def _send(self, manifest: WeightManifest) -> None:
        self._source.specs = manifest.tensors
        if self._trainer is None:
            self._trainer = self._open(max(spec.nbytes for spec in manifest.tensors))
        self._trainer.send_weights()  # calls start, update and finish of EngineCalls

    def _open(self, largest_bytes: int) -> Any:
        if self._transfer == "nccl":
            info = NCCLTrainerInitInfo(self._address, get_open_port(), self._world_size, rank=0)
        else:
            # Packed: one buffer is shared instead of a cast copy of the whole model. No tensor may exceed it.
            size = max(largest_bytes, IPCTrainerInitInfo.packed_buffer_size_bytes)
            info = IPCTrainerInitInfo(packed=True, packed_buffer_size_bytes=size, rank=0)
        return WeightTransferTrainerFactory.trainer_init(info, client=self._engines, source=self._source)


def _named(name: str, doing: str, error: BaseException) -> Exception:
    if isinstance(error, WeightMismatch):
        return error  # its message names engine and tensor
    # The text of a remote error is a traceback: its last line has the message.
    reason = str(error).strip().rpartition("\n")[2] or type(error).__name__
    failure = TransferFailed(f"{name} could not {doing}: {reason}")
    failure.__cause__ = error
    return failure
