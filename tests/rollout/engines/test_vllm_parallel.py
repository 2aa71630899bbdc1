"""The real vLLM with layers divided over two processes: synced, scored, sampled from and lost as an engine of one."""

from __future__ import annotations

import asyncio
import os
import signal
from math import prod
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel
from vllm.utils.network_utils import get_open_port

from learner.model.policy import Policy
from learner.settings import LoraSettings, ModelSettings
from learner.training.publish import take_snapshot
from rollout.engines.engine import EngineDied, Sampling
from rollout.engines.vllm_engine import VllmEngine
from rollout.engines.vllm_process import CallFailed, family
from rollout.engines.vllm_start import VllmSettings
from rollout.wire.weights import TensorSpec, WeightMismatch, WeightUpdate, write_memory
from tests.bench.bench_probe import spoil_loading
from tests.families import build_family
from tests.learner.model.test_families import IDS, chosen, logits, plain
from tests.rollout.engines import store_transfer
from tests.rollout.engines.test_vllm_process import _command, _shared, _wait_until_gone

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

CONTEXT = 192
SETTINGS = VllmSettings(
    dtype="float32",
    kv_cache_gib=0.25,
    max_num_seqs=16,
    tensor_parallel_size=2,
    args={"max_num_batched_tokens": 256},  # prompts of several are computed in parts
)


def _moved(policy: Policy, scale: float) -> None:
    with torch.no_grad():
        for place, parameter in enumerate(policy.parameters()):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(place))
            parameter.add_(noise, alpha=scale)


class Learner:
    """A policy whose versions are written to memory."""

    def __init__(self, name: str, tie: bool, folder: Path, lora: LoraSettings | None = None) -> None:
        # vLLM on CPUs pads experts' hidden layers to multiples of 32 a process, which a reload does not.
        sizes = {"moe_intermediate_size": 64} if "A3B" in name else {}
        self.tokens = build_family(name, tie, folder, **sizes)
        self.policy = Policy(ModelSettings(path=str(folder), lora=lora))
        self._folder = folder

    def saved(self) -> PreTrainedModel:
        """transformers' own model with the present weights."""
        self.policy.save(self._folder / "saved")
        return plain(self._folder / "saved")

    def update(self, version: int) -> WeightUpdate:
        snapshot = take_snapshot(self.policy, version, "float32")
        handle, self.alive = write_memory(snapshot.arrays)
        return WeightUpdate(snapshot.manifest, handle)


DIVIDED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def _share(spec: TensorSpec, rank: int) -> int:
    """Bytes of a tensor that one of two processes needs: half of a divided matrix, or its rows of the vocabulary."""
    layer = spec.name.split(".")[-2]
    if layer in ("embed_tokens", "lm_head"):
        rows, width = spec.shape
        half = 32 * -(-rows // 64)  # vLLM pads a vocabulary to a multiple of 64
        return (rows - half if rank else half) * width * spec.word_bytes
    return prod(spec.shape) * spec.word_bytes // (2 if layer in DIVIDED else 1)


async def _copies_shares(engine: VllmEngine, learner: Learner) -> None:
    """Each process copies what its layers need of a version, once."""
    update = learner.update(0)
    await engine.sync(update)
    copied = await engine._llm.collective_rpc("copied_bytes")
    specs = update.manifest.tensors
    assert copied == [sum(_share(spec, rank) for spec in specs) for rank in range(2)]
    assert max(copied) < 0.6 * update.manifest.nbytes


async def _takes_versions_natively_and_by_handles(engine: VllmEngine, learner: Learner) -> None:
    """In any order, by two groups one after the other; a sender that dies costs one version of the native kind."""
    await engine._llm.collective_rpc(store_transfer.install)
    for version in (11, 13):
        sender = store_transfer.Sender(get_open_port(), workers=2)
        await asyncio.gather(engine.open_transfer(sender.info), asyncio.to_thread(sender.join))
        _moved(learner.policy, 0.02)
        await _takes_natively(engine, learner, sender, version)
        assert await engine._llm.collective_rpc("copied_bytes") == [0, 0], "out of published memory"
        _moved(learner.policy, 0.02)
        await engine.sync(learner.update(version + 1))
        np.testing.assert_allclose(await engine.score(IDS), learner.policy.score_ids(IDS), atol=1e-4)
    sender = store_transfer.Sender(get_open_port(), workers=2)
    await asyncio.gather(engine.open_transfer(sender.info | {"seconds": 0.5}), asyncio.to_thread(sender.join))
    manifest = learner.update(15).manifest
    await engine.begin_update(manifest)
    with pytest.raises(CallFailed, match=r"did not end within 0\.5 s"):
        await engine.receive(store_transfer.described(manifest.tensors))
    _moved(learner.policy, 0.02)
    await engine.sync(learner.update(16))
    np.testing.assert_allclose(await engine.score(IDS), learner.policy.score_ids(IDS), atol=1e-4)


async def _takes_natively(
    engine: VllmEngine, learner: Learner, sender: store_transfer.Sender, version: int
) -> None:
    manifest = learner.update(version).manifest
    await engine.begin_update(manifest)
    tensors = [tensor.clone() for _, tensor in learner.policy.named_weights(torch.float32)]
    await asyncio.gather(
        engine.receive(store_transfer.described(manifest.tensors)), asyncio.to_thread(sender.send, tensors)
    )
    report = await engine.finish_update(manifest)
    assert (report.version, report.probe_difference < 1e-4) == (version, True)
    np.testing.assert_allclose(await engine.score(IDS), learner.policy.score_ids(IDS), atol=1e-4)


async def _refuses_a_share_of_another_layer(engine: VllmEngine, learner: Learner) -> None:
    """Two layers that change places behind the checksums are found in the process's own share."""
    await engine._llm.collective_rpc(spoil_loading, args=("swapped", 0))
    with pytest.raises(WeightMismatch, match=r"computes with another \S+ than was received"):
        await engine.sync(learner.update(20))


async def _follows(engine: VllmEngine, learner: Learner) -> None:
    """Versions are loaded by both processes, in flight too, and what is sampled is what the learner scores."""
    await engine.sync(learner.update(1))
    np.testing.assert_allclose(await engine.score(IDS), learner.policy.score_ids(IDS), atol=1e-4)
    before = learner.policy.score_ids(IDS)
    _moved(learner.policy, 0.02)
    running = [
        asyncio.create_task(engine.generate([5, 7 + i], Sampling(max_tokens=CONTEXT - 2))) for i in range(8)
    ]
    states = engine._llm.output_processor.request_states
    while not any(state.detokenizer.num_output_tokens() > 4 for state in states.values()):
        await asyncio.sleep(0.001)
    assert (await engine.sync(learner.update(2))).probe_difference < 1e-4
    spans = [completion.versions for completion in await asyncio.gather(*running)]
    assert {version for span in spans for version in span.tolist()} == {1, 2}
    assert all((np.diff(span) >= 0).all() for span in spans)
    after = learner.policy.score_ids(IDS)
    assert np.abs(after - before).mean() > 0.05
    np.testing.assert_allclose(await engine.score(IDS), after, atol=1e-4)
    completion = await engine.generate(IDS, Sampling(max_tokens=40))
    assert (completion.versions == 2).all()
    ids = IDS + completion.token_ids.tolist()
    # Engines sample from tokens alone; the vocabulary is padded beyond them.
    known = chosen(logits(learner.saved(), ids)[:, : learner.tokens], ids)[len(IDS) - 1 :]
    np.testing.assert_allclose(completion.logprobs, known, atol=1e-3)


async def _is_lost_with_one_process(engine: VllmEngine) -> None:
    """One worker's death ends every call with EngineDied, at once, and leaves no process."""
    core, *below = family(engine._core.pid)
    workers = [pid for pid in below if "resource_tracker" not in _command(pid)]
    assert len(workers) == 2, [_command(pid) for pid in below]
    shared = _shared([core, *workers])
    assert shared and not any(path.exists() for path in shared)
    calls = [engine.generate([5, 9], Sampling(max_tokens=CONTEXT - 2)), engine.ping()]
    waiting = [asyncio.create_task(call) for call in calls]
    await asyncio.sleep(0)
    os.kill(workers[1], signal.SIGKILL)
    with pytest.raises(EngineDied, match="rollout-0: vLLM"):
        await asyncio.wait_for(waiting[0], 60)
    await asyncio.wait(waiting, timeout=60)
    with pytest.raises(EngineDied):
        await asyncio.wait_for(engine.ping(), 60)
    await asyncio.wait_for(engine.close(), 60)
    _wait_until_gone([core, *workers])


@pytest.mark.parametrize(
    "name", ["Qwen3-0.6B", pytest.param("Qwen3-30B-A3B", marks=pytest.mark.rare)], ids=["dense", "experts"]
)
def test_two_processes_follow_the_learner_and_are_lost_together(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # a function is sent to vLLM's workers
    learner = Learner(name, True, tmp_path)

    async def run() -> None:
        engine = await VllmEngine.start("rollout-0", str(tmp_path), [], CONTEXT, SETTINGS)
        try:
            await _copies_shares(engine, learner)
            await _follows(engine, learner)
            await _takes_versions_natively_and_by_handles(engine, learner)
            await _refuses_a_share_of_another_layer(engine, learner)
        except BaseException:
            await engine.close()
            raise
        await _is_lost_with_one_process(engine)

    asyncio.run(run())


@pytest.mark.rare
def test_two_processes_serve_the_adapter_that_is_learned(tmp_path: Path) -> None:
    learner = Learner("Qwen3-0.6B", False, tmp_path, LoraSettings(rank=4, sync="adapter"))
    _moved(learner.policy, 0.1)
    assert learner.policy.adapter is not None
    spec = learner.policy.adapter.spec

    async def run() -> None:
        engine = await VllmEngine.start("rollout-0", str(tmp_path), [], CONTEXT, SETTINGS, adapter=spec)
        try:
            for version in range(2):
                assert (await engine.sync(learner.update(version))).probe_difference < 1e-4
                known = learner.policy.score_ids(IDS)
                np.testing.assert_allclose(await engine.score(IDS), known, atol=1e-3)
                _moved(learner.policy, 0.1)
        finally:
            await engine.close()

    asyncio.run(run())
