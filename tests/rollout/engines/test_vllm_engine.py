"""The real vLLM: what it samples is what the learner scores, before, during and after a weight sync."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from deploy.commands.export import export_model
from deploy.config import run_folder
from learner.model.tiny import build_tiny
from learner.model.tokenizer import build_tokenizer
from learner.settings import LearnerSettings, ModelSettings
from learner.training.learner import Learner
from learner.training.publish import Snapshot, take_snapshot
from rollout.engines.engine import Sampling
from rollout.engines.vllm_engine import VllmEngine
from rollout.engines.vllm_start import VllmSettings
from rollout.wire.weights import WeightMismatch, WeightUpdate, write_memory
from tests.bench.bench_probe import FAULTS, spoil_loading
from tests.deploy.small_run import configured

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

CONTEXT = 512


class Rig:
    """An engine and the learner's policy of the same tiny model, on one event loop."""

    def __init__(self, folder: Path, tie: bool) -> None:
        tokenizer = build_tokenizer(folder / "base", ("left", "down", "right", "up"))
        build_tiny(folder / "base", tokenizer, layers=2, width=64, heads=2, mlp=128, context=CONTEXT, tie=tie)
        learner = Learner(LearnerSettings(model=ModelSettings(path=str(folder / "base"))))
        self.policy = learner.policy
        self.perturb(0.05)  # what is exported is what was learned, not what it began with
        run_folder.create(configured(), folder / "run")
        learner.save(folder / "run")
        export_model(folder / "run", folder / "model")
        self.stop = tokenizer.eos_token_id
        self.loop = asyncio.new_event_loop()
        settings = VllmSettings(dtype="float32", kv_cache_gib=0.25, max_num_seqs=32)
        self.engine = self.loop.run_until_complete(
            VllmEngine.start("rollout-0", str(folder / "model"), [self.stop], CONTEXT, settings)
        )
        ids = np.random.default_rng(0).integers(0, self.policy.vocab_size, 40).tolist()
        # Kept: tests sync other weights, in whatever order they come.
        self.exported = self.loop.run_until_complete(self.engine.score(ids)), self.policy.score_ids(ids)

    def perturb(self, scale: float) -> None:
        with torch.no_grad():
            for position, parameter in enumerate(self.policy.parameters()):
                generator = torch.Generator().manual_seed(position)
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=scale)

    def snapshot(self, version: int) -> Snapshot:
        return take_snapshot(self.policy, version, "float32")

    def update(self, snapshot: Snapshot) -> WeightUpdate:
        handle, self.alive = write_memory(snapshot.arrays)
        return WeightUpdate(snapshot.manifest, handle)

    def sync(self, version: int) -> float:
        return self.loop.run_until_complete(
            self.engine.sync(self.update(self.snapshot(version)))
        ).probe_difference


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def rig(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # a function is sent to vLLM's worker
        made = Rig(tmp_path_factory.mktemp("rig"), request.param)
        yield made
    made.loop.run_until_complete(made.engine.close())
    made.loop.close()


def test_an_exported_folder_serves_what_was_learned(rig: Rig) -> None:
    engine, learner = rig.exported
    np.testing.assert_allclose(engine, learner, atol=1e-4)


def test_after_a_sync_the_engine_scores_as_the_learner_and_says_so(rig: Rig) -> None:
    rig.sync(0)
    ids = np.random.default_rng(1).integers(0, rig.policy.vocab_size, 40).tolist()
    before = rig.loop.run_until_complete(rig.engine.score(ids))
    rig.perturb(0.05)
    difference = rig.sync(1)
    after = rig.loop.run_until_complete(rig.engine.score(ids))
    assert rig.engine.version == 1
    assert difference < 1e-4
    np.testing.assert_allclose(after, rig.policy.score_ids(ids), atol=1e-4)
    assert np.abs(after - before).mean() > 0.05, "a large change of the weights must change the engine"


def test_sampled_logprobs_are_the_learners(rig: Rig) -> None:
    rig.sync(2)
    prompt = np.random.default_rng(2).integers(0, rig.policy.vocab_size, 20).tolist()
    completion = rig.loop.run_until_complete(
        rig.engine.generate(prompt, Sampling(temperature=1.0, max_tokens=30))
    )
    ids = prompt + completion.token_ids.tolist()
    assert completion.finish_reason == ("stop" if ids[-1] == rig.stop else "length")
    assert (completion.versions == 2).all()
    np.testing.assert_allclose(completion.logprobs, rig.policy.score_ids(ids)[len(prompt) - 1 :], atol=1e-4)


def test_a_request_running_across_a_sync_knows_both_versions(rig: Rig) -> None:
    async def run() -> set[int]:
        requests = [rig.engine.generate([1, 7 + i], Sampling(max_tokens=CONTEXT - 2)) for i in range(16)]
        running = [asyncio.create_task(request) for request in requests]
        await asyncio.sleep(0.2)
        await rig.engine.sync(rig.update(rig.snapshot(4)))
        completions = await asyncio.gather(*running)
        assert all((np.diff(completion.versions) >= 0).all() for completion in completions)
        return {int(version) for completion in completions for version in completion.versions}

    rig.sync(3)
    assert {3, 4} >= rig.loop.run_until_complete(run())


def test_no_cached_prefix_outlives_its_weights(rig: Rig) -> None:
    prompt = np.random.default_rng(3).integers(0, rig.policy.vocab_size, 128).tolist()
    rig.sync(5)
    rig.loop.run_until_complete(rig.engine.generate(prompt, Sampling(max_tokens=4)))
    rig.perturb(0.05)
    rig.sync(6)
    completion = rig.loop.run_until_complete(rig.engine.generate(prompt, Sampling(max_tokens=4)))
    learner = rig.policy.score_ids(prompt + completion.token_ids.tolist())[len(prompt) - 1 :]
    np.testing.assert_allclose(completion.logprobs, learner, atol=1e-4)


def test_a_version_without_one_tensor_is_refused_by_name(rig: Rig) -> None:
    rig.sync(7)
    whole = rig.snapshot(8)
    dropped = next(spec.name for spec in whole.manifest.tensors if "q_proj" in spec.name)
    kept = [index for index, spec in enumerate(whole.manifest.tensors) if spec.name != dropped]
    manifest = replace(whole.manifest, tensors=tuple(whole.manifest.tensors[index] for index in kept))
    partial = Snapshot(manifest, tuple(whole.arrays[index] for index in kept))
    with pytest.raises(WeightMismatch, match=dropped):
        rig.loop.run_until_complete(rig.engine.sync(rig.update(partial)))
    assert rig.engine.version == 7
    still = rig.loop.run_until_complete(rig.engine.generate([1, 9], Sampling(max_tokens=2)))
    assert (still.versions == 7).all(), "a version refused by name leaves the old one serving"


def test_a_tensor_that_arrives_changed_is_refused_by_name(rig: Rig) -> None:
    rig.sync(9)
    whole = rig.snapshot(10)
    arrays = [array.copy() for array in whole.arrays]
    arrays[3][0] ^= 1
    with pytest.raises(WeightMismatch, match=whole.manifest.tensors[3].name):
        rig.loop.run_until_complete(rig.engine.sync(rig.update(Snapshot(whole.manifest, tuple(arrays)))))


def test_an_engine_with_other_weights_fails_the_probe(rig: Rig) -> None:
    rig.sync(11)
    claimed = rig.snapshot(12)
    rig.perturb(0.05)
    other = rig.snapshot(12)
    mixed = Snapshot(replace(other.manifest, probe=claimed.manifest.probe), other.arrays)
    with pytest.raises(WeightMismatch, match="probe"):
        rig.loop.run_until_complete(rig.engine.sync(rig.update(mixed)))


def test_weights_that_go_wrong_behind_their_checksums_are_refused_by_name(rig: Rig) -> None:
    rig.sync(13)
    for kind in FAULTS:  # each is loaded wrongly by vLLM's worker, and leaves the engine paused
        rig.loop.run_until_complete(rig.engine._llm.collective_rpc(spoil_loading, args=("correct", 0)))
        rig.sync(14)
        rig.perturb(2e-3)
        rig.loop.run_until_complete(rig.engine._llm.collective_rpc(spoil_loading, args=(kind, 0)))
        with pytest.raises(WeightMismatch, match=r"computes with another \S+ than was received"):
            rig.sync(15)
