"""The transformers engine samples what it says it samples, and holds what was published."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from learner.model.policy import Policy
from learner.model.tiny import build_tiny
from learner.settings import LoraSettings, ModelSettings
from learner.training.publish import take_snapshot
from rollout.engines.engine import Completion, EngineFailed, Sampling, SleepLevel
from rollout.engines.hf_engine import HfEngine, _nucleus
from rollout.wire.weights import WeightMismatch, WeightUpdate, inline

PROMPT = [3, 14, 15, 9, 26]


class Rig:
    def __init__(self, folder: Path, tokenizer: PreTrainedTokenizerFast, tie: bool) -> None:
        build_tiny(folder, tokenizer, layers=1, width=16, heads=2, mlp=32, context=64, tie=tie)
        self.policy = Policy(ModelSettings(path=str(folder)))
        self.engine = HfEngine.load(str(folder), [tokenizer.eos_token_id])

    def published(self, version: int) -> WeightUpdate:
        snapshot = take_snapshot(self.policy, version, "float32")
        return WeightUpdate(snapshot.manifest, inline(snapshot.arrays))

    def perturb(self) -> None:
        with torch.no_grad():
            for parameter in self.policy.parameters():
                parameter.add_(
                    torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)), alpha=0.1
                )

    def generate(self, *requests: Sampling) -> list[Completion]:
        async def run() -> list[Completion]:
            return await asyncio.gather(*(self.engine.generate(PROMPT, sampling) for sampling in requests))

        return asyncio.run(run())


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def rig(request: pytest.FixtureRequest, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Rig:
    return Rig(tmp_path, tokenizer, request.param)


def test_temperature_0_is_the_likeliest_token_each_time(rig: Rig) -> None:
    first, again = rig.generate(*(Sampling(temperature=0.0, max_tokens=8, seed=seed) for seed in (1, 2)))
    assert first.token_ids.tolist() == again.token_ids.tolist()
    ids = torch.tensor([PROMPT + first.token_ids.tolist()])
    with torch.no_grad():
        logprobs = rig.engine._model(ids).logits[0, len(PROMPT) - 1 : -1].log_softmax(-1)
    assert first.token_ids.tolist() == logprobs.argmax(-1).tolist()
    np.testing.assert_allclose(first.logprobs, logprobs.max(-1).values, atol=1e-5)


def test_logprobs_are_of_the_tempered_distribution(rig: Rig) -> None:
    (completion,) = rig.generate(Sampling(temperature=0.7, max_tokens=20, seed=5))
    ids = torch.tensor([PROMPT + completion.token_ids.tolist()])
    with torch.no_grad():
        logprobs = (rig.engine._model(ids).logits[0] / 0.7).log_softmax(-1)  # all at once, without a cache
    sampled = [float(logprobs[len(PROMPT) - 1 + i, token]) for i, token in enumerate(completion.token_ids)]
    np.testing.assert_allclose(completion.logprobs, sampled, atol=1e-5)


def test_a_seeded_request_does_not_depend_on_its_company(rig: Rig) -> None:
    wanted = Sampling(max_tokens=12, seed=8)
    (alone,) = rig.generate(wanted)
    together = rig.generate(Sampling(max_tokens=9, seed=1), wanted, Sampling(max_tokens=12, seed=2))
    assert together[1].token_ids.tolist() == alone.token_ids.tolist()
    assert together[2].token_ids.tolist() != alone.token_ids.tolist()


def test_a_turn_ends_with_its_stop_token_or_by_length(rig: Rig) -> None:
    everything = HfEngine(rig.engine._model, range(1000))
    stopped = asyncio.run(everything.generate(PROMPT, Sampling(max_tokens=9)))
    assert (len(stopped.token_ids), stopped.finish_reason) == (1, "stop")
    never = HfEngine(rig.engine._model, [])
    cut = asyncio.run(never.generate(PROMPT, Sampling(max_tokens=9)))
    assert (len(cut.token_ids), cut.finish_reason) == (9, "length")


def test_a_nucleus_is_the_smallest_set_of_enough_mass() -> None:
    kept = _nucleus(torch.tensor([0.1, 0.5, 0.15, 0.25]).log(), top_p=0.7).exp()
    np.testing.assert_allclose(kept, [0, 0.5 / 0.75, 0, 0.25 / 0.75], atol=1e-6)


def test_after_a_sync_the_engine_is_the_learner(rig: Rig) -> None:
    rig.perturb()
    report = asyncio.run(rig.engine.sync(rig.published(3)))
    assert (report.version, rig.engine.version) == (3, 3)
    assert report.probe_difference < 1e-5
    np.testing.assert_allclose(asyncio.run(rig.engine.score(PROMPT)), rig.policy.score_ids(PROMPT), atol=1e-5)


def test_an_adapter_alone_makes_the_engine_the_learner_version_after_version(rig: Rig) -> None:
    lora = LoraSettings(rank=2, targets=("k_proj", "down_proj"), sync="adapter")
    rig.policy = Policy(rig.policy.settings.model_copy(update={"lora": lora}))
    for version in range(3):
        report = asyncio.run(rig.engine.sync(rig.published(version)))
        assert (report.version, report.tensors) == (version, 4)
        np.testing.assert_allclose(
            asyncio.run(rig.engine.score(PROMPT)), rig.policy.score_ids(PROMPT), atol=1e-5
        )
        rig.perturb()
    update = rig.published(3)
    fewer = replace(update.manifest, tensors=update.manifest.tensors[1:])
    with pytest.raises(WeightMismatch, match=update.manifest.tensors[0].name):
        asyncio.run(rig.engine.sync(WeightUpdate(fewer, update.handle)))
    elsewhere = replace(
        update.manifest, adapter=replace(update.manifest.adapter, layers=("model.layers.7.mlp.up_proj",))
    )
    with pytest.raises(WeightMismatch, match=r"layers\.7"):
        asyncio.run(rig.engine.sync(WeightUpdate(elsewhere, update.handle)))
    assert rig.engine.version == 2


@pytest.mark.parametrize("level", [1, 2])
def test_an_engine_that_slept_samples_what_it_would_have(rig: Rig, level: SleepLevel) -> None:
    wanted = Sampling(max_tokens=12, seed=8)

    async def run() -> None:
        if level == 1:  # the next version is an adapter for weights that are kept
            lora = LoraSettings(rank=2, targets=("k_proj", "down_proj"), sync="adapter")
            rig.policy = Policy(rig.policy.settings.model_copy(update={"lora": lora}))
        await rig.engine.sync(rig.published(1))
        rig.perturb()
        update = rig.published(2)
        await rig.engine.sync(update)
        stayed, held = await rig.engine.generate(PROMPT, wanted), rig.engine.weight_bytes
        await rig.engine.sleep(level)
        await rig.engine.sleep(level)  # asked again, it sleeps on
        assert rig.engine.weight_bytes == 0 < held
        with pytest.raises(EngineFailed, match=r"^hf sleeps: "):
            await rig.engine.generate(PROMPT, wanted)
        await rig.engine.sync(update)
        assert rig.engine.weight_bytes == held
        slept = await rig.engine.generate(PROMPT, wanted)
        assert slept.token_ids.tolist() == stayed.token_ids.tolist()
        assert slept.logprobs.tolist() == stayed.logprobs.tolist() and set(slept.versions) == {2}

    asyncio.run(run())


def test_a_sync_between_two_tokens_shows_in_the_versions(rig: Rig) -> None:
    async def run() -> list[int]:
        await rig.engine.sync(rig.published(0))
        never = HfEngine(rig.engine._model, [])
        never.version = 0
        request = asyncio.create_task(never.generate(PROMPT, Sampling(max_tokens=6, seed=0)))
        for _ in range(3):
            await asyncio.sleep(0)
        await never.sync(rig.published(1))
        return (await request).versions.tolist()

    assert asyncio.run(run()) == [0, 0, 0, 1, 1, 1]


def test_a_wrong_publication_is_refused_by_name_and_changes_nothing(rig: Rig) -> None:
    before = asyncio.run(rig.engine.score(PROMPT))
    rig.perturb()
    whole = rig.published(1)
    first = whole.manifest.tensors[0]
    misshapen = replace(first, shape=first.shape[::-1])
    manifest = replace(whole.manifest, tensors=(misshapen, *whole.manifest.tensors[1:]))
    with pytest.raises(WeightMismatch, match=first.name):
        asyncio.run(rig.engine.sync(WeightUpdate(manifest, whole.handle)))
    np.testing.assert_array_equal(asyncio.run(rig.engine.score(PROMPT)), before)
    assert rig.engine.version == -1


def test_a_request_beyond_the_models_positions_is_refused_with_the_numbers(rig: Rig) -> None:
    with pytest.raises(EngineFailed, match=r"5 prompt tokens and max_tokens=60 exceed the model's 64"):
        rig.generate(Sampling(max_tokens=60))
