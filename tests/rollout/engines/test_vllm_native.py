"""vLLM's native weight transfers, as far as a CPU reaches: order of calls, names, version, probe, failures, limits.

GPUs were not exercised (native_rig.py has what stands in for them). What NCCL, CUDA IPC and vLLM's reload on a GPU do
is for the probe of a real run to judge.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.distributed.weight_transfer import nccl_engine
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

from learner.model.policy import Policy
from learner.model.tiny import build_tiny
from learner.model.tokenizer import build_tokenizer
from learner.settings import ModelSettings
from learner.training.publish import take_snapshot
from rollout.engines.vllm_checkpoint import checkpoint_names
from rollout.engines.vllm_engine import VllmEngine
from rollout.engines.vllm_native import LiveSource, NativePublisher
from rollout.engines.vllm_start import VllmSettings
from rollout.wire.weights import TransferFailed, WeightMismatch
from tests.rollout.engines.native_rig import GPUS, FakeCore, FakeLlm, IpcTrainer, Rig, Wires

SYNC = ["pause", "start", "update", "finish", "resume", "generate"]


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
def make_rig(folders: list[Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    rigs: list[Rig] = []

    async def make(transfer: Any = "nccl", extra_name: str = "", engines: int = 2) -> Rig:
        wires = Wires()
        monkeypatch.setattr(nccl_engine, "open_trainer_endpoint", wires.open)
        monkeypatch.setattr(nccl_engine, "packed_nccl_broadcast_producer", wires.broadcast)
        monkeypatch.setitem(WeightTransferTrainerFactory._registry, "ipc", lambda: IpcTrainer)
        monkeypatch.setattr(IPCTrainerInitInfo, "packed_buffer_size_bytes", 1)
        names = checkpoint_names(str(folders[1]))
        llms = {f"rollout-{seat}": FakeLlm(folders[1], wires) for seat in range(engines)}
        made = {
            name: VllmEngine(
                llm,
                FakeCore(),
                name,
                [0],
                [*names, *([extra_name] if name == "rollout-1" and extra_name else [])],
                VllmSettings(),
            )
            for name, llm in llms.items()
        }
        policy = Policy(ModelSettings(path=str(folders[0])))
        rig = Rig(policy, None, llms, made)  # type: ignore[arg-type]  # the publisher is given the rig's weights
        rig.publisher = NativePublisher(transfer, rig.named_weights, GPUS, "learner-host", 50.0, 100.0)
        rigs.append(rig)
        return rig

    yield make
    for rig in rigs:
        rig.publisher._thread.shutdown()


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
        assert all(llm.init_info["native"] == "nccl" for llm in rig.llms.values())
        infos = [llm.init_info["info"] for llm in rig.llms.values()]
        assert [info["rank_offset"] for info in infos] == [1, 3]
        assert {info["world_size"] for info in infos} == {5}
        assert {info["master_address"] for info in infos} == {"learner-host"}
        assert len({info["master_port"] for info in infos}) == 1

    asyncio.run(run())


def test_the_group_is_made_again_for_the_engines_that_serve(make_rig: Any) -> None:
    async def run() -> None:
        rig = await make_rig(engines=3)
        groups = [
            ("rollout-0", "rollout-1"),
            ("rollout-0",),
            ("rollout-0", "rollout-2"),
            ("rollout-0", "rollout-2"),
        ]
        for version, names in enumerate(groups):
            rig.perturb()
            reports = await rig.publish(version, *names)
            assert [report.engine for report in reports] == list(names)
            assert all(report.probe_difference < 1e-5 for report in reports)
            assert {rig.llms[name].init_info["info"]["world_size"] for name in names} == {
                1 + GPUS * len(names)
            }
        joined = [llm.calls.count("init") for llm in rig.llms.values()]
        assert joined == [3, 1, 1], "a group that stays is not made again"
        assert [llm.version for llm in rig.llms.values()] == ["3", "0", "3"]

    asyncio.run(run())


@pytest.mark.parametrize("call", ["init", "start", "update", "finish"])
def test_after_a_transfer_that_an_engine_broke_the_others_go_on(make_rig: Any, call: str) -> None:
    # They are given the version by a handle, with half of another one in them, and the next one directly.
    async def run() -> None:
        rig = await make_rig(engines=3)
        await rig.publish(0)

        async def die() -> None:
            raise RuntimeError("killed")

        rig.llms["rollout-1"].orders[call] = die
        rig.perturb()
        with pytest.raises(TransferFailed, match=r"^rollout-1 could not .*: killed$"):
            await rig.publish(1, *(["rollout-0", "rollout-1"] if call == "init" else []))
        served = ("rollout-0", "rollout-2")
        for name in served:
            assert (await rig.sync(name, 1)).probe_difference < 1e-5
        rig.perturb()
        for report in await rig.publish(2, *served):
            assert (report.version, report.probe_difference < 1e-5) == (2, True)

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
        await rig.refuse(TransferFailed, f"^{who} did not {SILENCES[call]} weight version 0 within 100 s$")
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
    source.open(bare.manifest.tensors)
    sent = list(source)
    assert [(meta.name, meta.dtype, meta.shape) for meta in source.metadata()] == [
        (name, tensor.dtype, tuple(tensor.shape)) for name, tensor in sent
    ]
    assert [tensor.contiguous().view(torch.uint8).numpy().tobytes() for _, tensor in sent] == [
        array.tobytes() for array in whole.arrays
    ]
    assert sorted(name for name, _ in sent) == sorted(checkpoint_names(str(folders[0])))
    assert "lm_head.weight" not in dict(sent)
