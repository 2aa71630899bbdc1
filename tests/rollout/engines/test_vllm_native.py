"""vLLM's native weight transfers, as far as a CPU reaches: order of calls, names, version, probe, failures, limits.

GPUs were not exercised. The nccl trainer is vLLM's own, with its rendezvous and its broadcast replaced by hand-over
within this process; the ipc trainer is replaced whole. Engines are Manta's over a stand-in for AsyncLLM whose model
is transformers'. What NCCL, CUDA IPC and vLLM's reload on a GPU do is for the probe of a real run to judge.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from vllm.distributed.weight_transfer import nccl_engine
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

from learner.model.policy import Policy
from learner.model.tiny import build_tiny
from learner.model.tokenizer import build_tokenizer
from learner.settings import ModelSettings
from learner.training.publish import take_snapshot
from rollout.engines.hf_engine import HfEngine
from rollout.engines.vllm_checkpoint import checkpoint_names
from rollout.engines.vllm_engine import VllmEngine
from rollout.engines.vllm_native import LiveSource, NativePublisher, TransferFailed
from rollout.engines.vllm_start import VllmSettings
from rollout.wire.weights import SyncReport, WeightMismatch

Pairs = list[tuple[str, torch.Tensor]]
SYNC = ["pause", "start", "update", "finish", "resume", "generate"]


class Wire:
    """In NCCL's place: the sender stands still until every engine receives, then all get the same tensors."""

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

    def tear(self) -> None:
        with self._changed:
            self.torn = True
            self._changed.notify_all()


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
        pairs = list(self.source)
        self.client.start_weight_update()
        self.client.update_weights({"tensors": pairs[:3]})
        self.client.update_weights({"tensors": pairs[3:]})
        self.client.finish_weight_update()


class FakeCore:
    """A core that never dies."""

    async def answer(self, call: Coroutine[Any, Any, Any]) -> Any:
        return await call


class FakeLlm:
    """AsyncLLM as far as a sync reaches into it; `orders[call]` runs in place of, or before, what a call does."""

    def __init__(self, folder: Path, wire: Wire) -> None:
        self.calls: list[str] = []
        self.orders: dict[str, Callable[[], Any]] = {}
        self.init_info: dict[str, Any] = {}
        self.version = "nobody's"
        self._wire = wire
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

    async def update_weights(self, request: Any) -> None:
        await self._call("update")
        info = request.update_info
        pairs = info["tensors"] if "tensors" in info else await self._wire.receive()
        with torch.no_grad():
            for name, tensor in pairs:
                self._model.get_parameter(name).copy_(tensor)

    async def finish_weight_update(self, weight_version: str) -> None:
        await self._call("finish")
        self.version = weight_version

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
    """A learner's policy and two engines that began with other weights."""

    policy: Policy
    publisher: NativePublisher
    llms: dict[str, FakeLlm]
    wire: Wire

    async def publish(self, version: int, dtype: str = "float32") -> list[SyncReport]:
        snapshot = take_snapshot(self.policy, version, dtype, with_bytes=False)
        return list(await self.publisher.publish(snapshot))

    async def refuse(self, error: type[Exception], match: str) -> None:
        try:
            with pytest.raises(error, match=match):
                await self.publish(0)
        finally:
            self.wire.tear()
            await asyncio.to_thread(self.publisher._thread.shutdown)

    def perturb(self) -> None:
        with torch.no_grad():
            for parameter in self.policy.parameters():
                parameter.mul_(1.3)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    made = []
    for seed in (0, 1):
        folder = tmp_path_factory.mktemp("model")
        tokenizer = build_tokenizer(folder, ("left", "right"))
        build_tiny(folder, tokenizer, layers=1, width=32, heads=2, mlp=64, context=64, seed=seed)
        made.append(folder)
    return made


@pytest.fixture
def make_rig(folders: list[Path], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    async def make(transfer: Any = "nccl", extra_name: str = "") -> Rig:
        wire = Wire(2)
        monkeypatch.setattr(nccl_engine, "open_trainer_endpoint", lambda info: info)
        monkeypatch.setattr(nccl_engine, "packed_nccl_broadcast_producer", wire.broadcast)
        monkeypatch.setitem(WeightTransferTrainerFactory._registry, "ipc", lambda: IpcTrainer)
        monkeypatch.setattr(IPCTrainerInitInfo, "packed_buffer_size_bytes", 1)
        llms, actors = {}, {}
        for name in ("rollout-0", "rollout-1"):
            llms[name] = FakeLlm(folders[1], wire)
            names = [
                *checkpoint_names(str(folders[1])),
                *([extra_name] if name == "rollout-1" and extra_name else []),
            ]
            actors[name] = _actor(VllmEngine(llms[name], FakeCore(), name, [0], names, VllmSettings()))
        policy = Policy(ModelSettings(path=str(folders[0])))
        publisher = NativePublisher(
            transfer, policy.named_weights, actors, 2, "learner-host", sync_timeout_seconds=100.0
        )
        return Rig(policy, publisher, llms, wire)

    return make


def _actor(engine: VllmEngine) -> Any:
    """A handle of the engine's actor, as far as a transfer uses it."""
    methods = (engine.open_transfer, engine.begin_update, engine.receive, engine.finish_update)
    return SimpleNamespace(**{method.__name__: Remote(method) for method in methods})


@pytest.mark.parametrize(("transfer", "parts"), [("nccl", 1), ("ipc", 2)])
def test_every_engine_ends_with_the_learners_weights_version_and_proof(
    make_rig: Any, transfer: str, parts: int
) -> None:
    async def run() -> None:
        rig = await make_rig(transfer)
        for version in (0, 1):
            rig.perturb()
            reports = await rig.publish(version)
            assert [(report.engine, report.version) for report in reports] == [
                (name, version) for name in rig.llms
            ]
            assert all(report.probe_difference < 1e-5 for report in reports)
            assert all(report.tensors == len(list(rig.policy.named_weights())) for report in reports)
        sync = [*SYNC[:2], *["update"] * parts, *SYNC[3:]]
        for llm in rig.llms.values():
            assert llm.calls == ["init", *sync, *sync]
            assert llm.version == "1"

    asyncio.run(run())


def test_the_ranks_of_engines_follow_one_another_after_the_learner(make_rig: Any) -> None:
    async def run() -> None:
        rig = await make_rig()
        await rig.publish(0)
        infos = [llm.init_info for llm in rig.llms.values()]
        assert [info["rank_offset"] for info in infos] == [1, 3]
        assert {info["world_size"] for info in infos} == {5}
        assert {info["master_address"] for info in infos} == {"learner-host"}
        assert len({info["master_port"] for info in infos}) == 1

    asyncio.run(run())


def test_an_engine_that_computes_with_other_weights_is_named(make_rig: Any) -> None:
    async def run() -> None:
        rig = await make_rig()

        async def spoil() -> None:
            rig.llms["rollout-1"].spoil()

        rig.llms["rollout-1"].orders["finish"] = spoil
        await rig.refuse(WeightMismatch, "rollout-1: after the sync to version 0")

    asyncio.run(run())


def test_other_names_are_refused_before_generation_is_paused(make_rig: Any) -> None:
    async def run() -> None:
        rig = await make_rig(extra_name="lm_head.weight")
        await rig.refuse(WeightMismatch, "rollout-1: version 0 lacks tensor lm_head.weight")
        assert rig.llms["rollout-1"].calls == ["init"]

    asyncio.run(run())


def test_an_update_that_fails_is_told_at_once_and_no_engine_goes_on(make_rig: Any) -> None:
    # The other engine receives, and the learner sends, for ever: only the failure itself can end the wait.
    async def run() -> None:
        rig = await make_rig()

        async def fail() -> None:
            raise RuntimeError("Remote traceback\n  somewhere\nCUDA out of memory")

        rig.llms["rollout-1"].orders["update"] = fail
        await rig.refuse(TransferFailed, "^rollout-1 could not load weight version 0: CUDA out of memory$")
        assert all(llm.calls == ["init", "pause", "start", "update"] for llm in rig.llms.values())

    asyncio.run(run())


SILENCES = {"init": "join the transfer of", "pause": "pause for", "update": "load", "generate": "prove"}


@pytest.mark.parametrize("call", SILENCES)
def test_a_silent_engine_is_named_when_time_is_up(
    make_rig: Any, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    # Time is up when one engine hangs and the other has answered; while it loads, it waits for a sender that waits too.
    async def run() -> None:
        rig = await make_rig()
        silent = asyncio.Event()

        async def hang() -> None:
            silent.set()
            await asyncio.Event().wait()

        async def time_out(waiting: Any, limit_s: float) -> None:
            waiting.close()
            await silent.wait()
            if call != "update":
                await asyncio.wait([rig.publisher._engines.round.calls["rollout-1"]])
            raise TimeoutError

        rig.llms["rollout-0"].orders[call] = hang
        monkeypatch.setattr(asyncio, "wait_for", time_out)
        who = "rollout-0, rollout-1" if call == "update" else "rollout-0"
        await rig.refuse(TimeoutError, f"^{who} did not {SILENCES[call]} weight version 0 within 100 s$")
        assert ("resume" in rig.llms["rollout-0"].calls) == (call == "generate")

    asyncio.run(run())


def test_the_live_source_yields_what_the_manifest_says_and_a_tied_head_once(folders: list[Path]) -> None:
    policy = Policy(ModelSettings(path=str(folders[0])))
    whole = take_snapshot(policy, 3, "bfloat16")
    bare = take_snapshot(policy, 3, "bfloat16", with_bytes=False)
    assert bare.arrays == ()
    assert bare.manifest == replace(
        whole.manifest, tensors=tuple(replace(spec, checksum="") for spec in whole.manifest.tensors)
    )
    source = LiveSource(policy.named_weights)
    source.specs = bare.manifest.tensors
    sent = list(source)
    assert [(meta.name, meta.dtype, meta.shape) for meta in source.metadata()] == [
        (name, tensor.dtype, tuple(tensor.shape)) for name, tensor in sent
    ]
    assert [tensor.contiguous().view(torch.uint8).numpy().tobytes() for _, tensor in sent] == [
        array.tobytes() for array in whole.arrays
    ]
    assert sorted(name for name, _ in sent) == sorted(checkpoint_names(str(folders[0])))
    assert "lm_head.weight" not in dict(sent)
