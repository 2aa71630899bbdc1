"""The real vLLM with an adapter that is replaced: what it samples is what the learner scores."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from learner.model.policy import Policy
from learner.model.tiny import build_tiny
from learner.model.tokenizer import build_tokenizer
from learner.settings import LoraSettings, ModelSettings
from learner.training.publish import Snapshot, take_snapshot
from rollout.engines.engine import Sampling
from rollout.engines.vllm_engine import VllmEngine
from rollout.engines.vllm_start import VllmSettings
from rollout.wire.weights import WeightMismatch, WeightUpdate, write_memory

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

CONTEXT = 512


class Rig:
    """An engine that was started for an adapter, and the learner's policy that trains it, on one event loop."""

    def __init__(self, folder: Path, lora: LoraSettings, tie: bool) -> None:
        tokenizer = build_tokenizer(folder / "model", ("left", "down", "right", "up"))
        path = str(folder / "model")
        build_tiny(Path(path), tokenizer, layers=2, width=64, heads=2, mlp=128, context=CONTEXT, tie=tie)
        self.policy = Policy(ModelSettings(path=path, lora=lora))
        assert self.policy.adapter is not None
        self.loop = asyncio.new_event_loop()
        settings = VllmSettings(dtype="float32", kv_cache_gib=0.25, max_num_seqs=32)
        started = VllmEngine.start(
            "rollout-0", path, [tokenizer.eos_token_id], CONTEXT, settings, adapter=self.policy.adapter.spec
        )
        self.engine = self.loop.run_until_complete(started)

    def perturb(self) -> None:
        with torch.no_grad():
            for position, parameter in enumerate(self.policy.parameters()):
                generator = torch.Generator().manual_seed(position)
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)

    def update(self, snapshot: Snapshot) -> WeightUpdate:
        handle, self.alive = write_memory(snapshot.arrays)
        return WeightUpdate(snapshot.manifest, handle)

    def sync(self, version: int) -> float:
        update = self.update(take_snapshot(self.policy, version, "float32"))
        return self.loop.run_until_complete(self.engine.sync(update)).probe_difference


@pytest.fixture(scope="module", params=["tied", "untied"])
def rig(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    # A rank that vLLM rounds up, and layers that it packs into one of which only a part is adapted.
    lora = LoraSettings(rank=3, alpha=5.0, sync="adapter", targets=("q_proj", "v_proj", "o_proj", "up_proj"))
    if request.param == "untied":
        lora = LoraSettings(sync="adapter")
    made = Rig(tmp_path_factory.mktemp("rig"), lora, request.param == "tied")
    yield made
    made.loop.run_until_complete(made.engine.close())
    made.loop.close()


def test_every_version_scores_and_samples_as_the_learner(rig: Rig) -> None:
    ids = np.random.default_rng(1).integers(0, rig.policy.vocab_size, 40).tolist()
    scores = []
    for version in range(3):
        assert rig.sync(version) < 1e-4
        assert rig.engine.version == version
        scores.append(rig.loop.run_until_complete(rig.engine.score(ids)))
        np.testing.assert_allclose(scores[-1], rig.policy.score_ids(ids), atol=1e-3)
        request = rig.engine.generate(ids[:20], Sampling(max_tokens=30))
        completion = rig.loop.run_until_complete(request)
        assert (completion.versions == version).all()
        learner = rig.policy.score_ids(ids[:20] + completion.token_ids.tolist())[19:]
        np.testing.assert_allclose(completion.logprobs, learner, atol=1e-3)
        rig.perturb()
    assert np.abs(scores[1] - scores[0]).mean() > 0.05
    assert np.abs(scores[2] - scores[1]).mean() > 0.05
    assert not list(Path(tempfile.gettempdir()).glob("manta-adapter-*"))


def test_a_running_request_goes_on_under_the_next_version(rig: Rig) -> None:
    async def run() -> None:
        requests = [rig.engine.generate([1, 7 + i], Sampling(max_tokens=CONTEXT - 2)) for i in range(16)]
        running = [asyncio.create_task(request) for request in requests]
        while not any(state.detokenizer.num_output_tokens() > 8 for state in states.values()):
            await asyncio.sleep(0.001)
        await rig.engine.sync(update)
        for index, completion in enumerate(await asyncio.gather(*running)):
            assert set(completion.versions) <= {3, 4}
            assert (np.diff(completion.versions) >= 0).all()
            # The keys and values of tokens before the sync are the old version's: the first new token shows whose
            # query it was, and none of the old ones may have been another's.
            ids = [1, 7 + index, *completion.token_ids.tolist()]
            old = completion.versions == 3
            np.testing.assert_allclose(completion.logprobs[old], before.score_ids(ids)[1:][old], atol=1e-3)
            both.update(completion.versions.tolist())

    rig.sync(3)
    states, both = rig.engine._llm.output_processor.request_states, set[int]()
    before = Policy(rig.policy.settings)
    before.model.load_state_dict(rig.policy.model.state_dict())
    rig.perturb()
    update = rig.update(take_snapshot(rig.policy, 4, "float32"))
    rig.loop.run_until_complete(run())
    assert both == {3, 4}


def test_no_cached_prefix_outlives_its_adapter(rig: Rig) -> None:
    prompt = np.random.default_rng(3).integers(0, rig.policy.vocab_size, 128).tolist()
    for version in (5, 6):
        rig.sync(version)
        completion = rig.loop.run_until_complete(rig.engine.generate(prompt, Sampling(max_tokens=4)))
        learner = rig.policy.score_ids(prompt + completion.token_ids.tolist())[len(prompt) - 1 :]
        np.testing.assert_allclose(completion.logprobs, learner, atol=1e-3)
        rig.perturb()


def test_an_adapter_without_one_tensor_is_refused_by_name(rig: Rig) -> None:
    rig.sync(7)
    whole = take_snapshot(rig.policy, 8, "float32")
    dropped = whole.manifest.tensors[3].name
    manifest = replace(whole.manifest, tensors=(*whole.manifest.tensors[:3], *whole.manifest.tensors[4:]))
    with pytest.raises(WeightMismatch, match=dropped):
        rig.loop.run_until_complete(rig.engine.sync(rig.update(Snapshot(manifest, whole.arrays))))
    still = rig.loop.run_until_complete(rig.engine.generate([1, 9], Sampling(max_tokens=2)))
    assert (still.versions == 7).all()


def test_another_adapter_fails_the_probe(rig: Rig) -> None:
    claimed = take_snapshot(rig.policy, 9, "float32")
    rig.perturb()
    other = take_snapshot(rig.policy, 9, "float32")
    mixed = Snapshot(replace(other.manifest, probe=claimed.manifest.probe), other.arrays)
    with pytest.raises(WeightMismatch, match="probe"):
        rig.loop.run_until_complete(rig.engine.sync(rig.update(mixed)))
