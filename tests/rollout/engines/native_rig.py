"""Stand-ins for vLLM's native transfers: a learner's policy, and engines that take its tensors in this process.

The nccl trainer is vLLM's own, with its rendezvous and its broadcast replaced; the ipc trainer is replaced whole.
Engines are Manta's over a stand-in for AsyncLLM whose model is transformers'.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

from learner.model.policy import Policy
from learner.training.publish import take_snapshot
from rollout.engines.hf_engine import HfEngine
from rollout.engines.vllm_engine import VllmEngine
from rollout.engines.vllm_native import LiveSource, NativePublisher
from rollout.engines.vllm_weights import as_torch
from rollout.wire.weights import SyncReport, WeightUpdate, write_memory

Pairs = list[tuple[str, torch.Tensor]]
GPUS = 2  # of an engine


class Wire:
    """In NCCL's place: the sender stands still until every engine receives, then all get the same tensors.

    It is also the sender's end of it.
    """

    def __init__(self, engines: int) -> None:
        self.torn = False
        self._engines, self._receiving = engines, 0
        self._changed = threading.Condition()
        self._arrived: Future[Pairs] = Future()

    def broadcast(self, iterator: Iterator[tuple[str, torch.Tensor]], **_: Any) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self.torn or self._receiving == self._engines)
            if self.torn:
                raise RuntimeError("the wire was torn")
            arrived, self._arrived, self._receiving = self._arrived, Future(), 0
        arrived.set_result([(name, tensor.clone()) for name, tensor in iterator])

    async def receive(self) -> Pairs:
        with self._changed:
            arrived = self._arrived
            self._receiving += 1
            self._changed.notify_all()
        return await asyncio.wrap_future(arrived)

    def destroy(self) -> None:
        with self._changed:
            self.torn = True
            self._changed.notify_all()


class Wires:
    """One for each group; `now` is the last."""

    now: Wire

    def open(self, info: Any) -> Wire:
        self.now = Wire((info.world_size - 1) // GPUS)
        return self.now

    def broadcast(self, **given: Any) -> None:
        self.now.broadcast(**given)


class IpcTrainer:
    """In the place of vLLM's ipc trainer: straight-line, in two parts."""

    def __init__(self, init_info: IPCTrainerInitInfo, client: Any, source: LiveSource) -> None:
        self.client, self.source = client, source
        assert init_info.packed
        client.init_weight_transfer_engine({"packed": True})
        largest = max(meta.dtype.itemsize * prod(meta.shape) for meta in source.metadata())
        assert init_info.packed_buffer_size_bytes == largest

    @classmethod
    def trainer_init(cls, init_info: IPCTrainerInitInfo, *, client: Any, source: LiveSource) -> IpcTrainer:
        return cls(init_info, client, source)

    def send_weights(self) -> None:
        pairs = [(name, tensor.clone()) for name, tensor in self.source]
        self.client.start_weight_update()
        self.client.update_weights({"tensors": pairs[:3]})
        self.client.update_weights({"tensors": pairs[3:]})
        self.client.finish_weight_update()

    def shutdown(self) -> None:
        pass


class FakeCore:
    """A core that never dies."""

    async def answer(self, call: Coroutine[Any, Any, Any]) -> Any:
        return await call


class FakeLlm:
    """AsyncLLM as far as a sync reaches into it; `orders[call]` runs in place of, or before, what a call does."""

    def __init__(self, folder: Path, wires: Wires) -> None:
        self.calls: list[str] = []
        self.orders: dict[str, Callable[[], Any]] = {}
        self.init_info: dict[str, Any] = {}
        self.version = "nobody's"
        self._wires = wires
        self._begun = False
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self._scorer = HfEngine(self._model, [])

    async def _call(self, name: str) -> None:
        self.calls.append(name)
        if name in self.orders:
            await self.orders[name]()

    async def init_weight_transfer_engine(self, request: Any) -> None:
        self.init_info = request.init_info
        await self._call("init")

    async def pause_generation(self, mode: str, clear_cache: bool) -> None:
        assert (mode, clear_cache) == ("keep", False)
        await self._call("pause")

    async def start_weight_update(self) -> None:
        await self._call("start")
        assert not self._begun, "vLLM refuses to begin a version within another one"
        self._begun = True

    async def update_weights(self, request: Any) -> None:
        await self._call("update")
        info = request.update_info
        if "update" in info:
            update = WeightUpdate.from_plain(info["update"])
            pairs = [(spec.name, as_torch(spec, array)) for spec, array in update.tensors()]
        else:
            pairs = info["tensors"] if "tensors" in info else await self._wires.now.receive()
        with torch.no_grad():
            for name, tensor in pairs:
                self._model.get_parameter(name).copy_(tensor)

    async def finish_weight_update(self) -> None:
        assert self._begun
        self._begun = False
        await self._call("finish")

    async def collective_rpc(self, method: str) -> list[str]:
        assert method == "update_failure"
        return ["", ""]

    async def update_weight_version(self, version: str) -> None:
        self.version = version

    async def get_weight_version(self) -> str:
        return self.version

    async def resume_generation(self) -> None:
        await self._call("resume")

    async def generate(
        self, prompt: Any, params: Any, request_id: str, lora_request: Any
    ) -> AsyncIterator[Any]:
        await self._call("generate")
        ids = prompt["prompt_token_ids"]
        scores = zip(ids[1:], await self._scorer.score(ids), strict=True)
        yield SimpleNamespace(prompt_logprobs=[None, *({i: SimpleNamespace(logprob=s)} for i, s in scores)])

    def spoil(self) -> None:
        with torch.no_grad():
            self._model.get_output_embeddings().weight.mul_(3.0)


@dataclass
class Remote:
    """A method of an actor that lives here."""

    remote: Callable[..., Any]


@dataclass
class Rig:
    """A learner's policy and engines that began with other weights."""

    policy: Policy
    publisher: NativePublisher
    llms: dict[str, FakeLlm]
    engines: dict[str, VllmEngine]
    taken: list[str] = field(default_factory=list)  # tensors that were gathered for the version under way

    def named_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        self.taken.clear()
        for name, tensor in self.policy.named_weights():
            self.taken.append(name)
            yield name, tensor

    async def publish(self, version: int, *names: str) -> list[SyncReport]:
        """To these engines; to all without names."""
        snapshot = take_snapshot(self.policy, version, "float32", with_bytes=False)
        workers = {name: actor(self.engines[name]) for name in names or self.engines}
        return list(await self.publisher.publish(snapshot, workers))

    async def sync(self, name: str, version: int) -> SyncReport:
        """By a handle, as of the object store."""
        snapshot = take_snapshot(self.policy, version, "float32")
        handle, _alive = write_memory(snapshot.arrays)
        return await self.engines[name].sync(WeightUpdate(snapshot.manifest, handle))

    async def refuse(self, error: type[Exception], match: str) -> None:
        with pytest.raises(error, match=match):
            await self.publish(0)
        assert len(self.taken) == len(list(self.policy.named_weights())), "other ranks gather all of them"

    def perturb(self) -> None:
        with torch.no_grad():
            for parameter in self.policy.parameters():
                parameter.mul_(1.3)


def actor(engine: VllmEngine) -> Any:
    """A handle of the engine's actor, as far as a transfer uses it."""
    methods = (engine.open_transfer, engine.begin_update, engine.receive, engine.finish_update)
    return SimpleNamespace(**{method.__name__: Remote(method) for method in methods})
