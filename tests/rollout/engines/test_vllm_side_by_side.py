"""The real vLLM with the adapters of two people: in one batch each request is computed with its own, or with none."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest
import torch

from learner.model.policy import Policy
from learner.model.tiny import build_tiny
from learner.model.tokenizer import build_tokenizer
from learner.settings import LoraSettings, ModelSettings
from rollout.engines.engine import Completion, Sampling
from rollout.engines.vllm_engine import VllmEngine
from rollout.engines.vllm_start import VllmSettings
from rollout.wire.adapter import AdapterSpec

CONTEXT = 256
PEOPLE = {  # of different ranks and layers; vLLM packs q, k and v into one
    "ann": LoraSettings(rank=3, alpha=5, targets=("q_proj", "v_proj", "o_proj", "up_proj")),
    "ben": LoraSettings(rank=8, alpha=16),
}


def adapted(base: Path, folder: Path, settings: LoraSettings, seed: int) -> Policy:
    """A policy with a random adapter, which is written with the merged model into the folder."""
    policy = Policy(ModelSettings(path=str(base), lora=settings))
    assert policy.adapter is not None
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, tensor in policy.adapter.tensors():
            tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=0.2)
    policy.save(folder)
    return policy


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_adapters_in_one_batch_are_each_its_own_merged_model(tmp_path: Path) -> None:
    base = tmp_path / "base"
    tokenizer = build_tokenizer(base, ("left", "right"))
    build_tiny(base, tokenizer, layers=2, width=64, heads=2, mlp=128, context=CONTEXT)
    for seed, (name, settings) in enumerate(PEOPLE.items()):
        adapted(base, tmp_path / name, settings, seed)
    merged: dict[str | None, Policy] = {
        name: Policy(ModelSettings(path=str(tmp_path / name))) for name in PEOPLE
    }
    merged[None] = Policy(ModelSettings(path=str(base)))
    prompts = [np.random.default_rng(number).integers(0, len(tokenizer), 70).tolist() for number in range(4)]

    async def run() -> dict[str | None, list[Completion]]:
        engine = await VllmEngine.start(
            "rollout-0",
            str(base),
            [tokenizer.eos_token_id],
            CONTEXT,
            VllmSettings(dtype="float32", kv_cache_gib=0.25, max_num_seqs=32),
            adapters={name: tmp_path / name / "adapter" for name in PEOPLE},
        )
        try:
            await engine.adopt_loaded(0)
            engines = {None: engine} | {name: engine.with_adapter(name) for name in PEOPLE}
            # The same prompts for all, twice: a prefix that one has cached serves no other.
            asked = [(name, prompt) for _ in range(2) for prompt in prompts for name in engines]
            requests = (engines[name].generate(prompt, Sampling(max_tokens=40)) for name, prompt in asked)
            found: dict[str | None, list[Completion]] = {name: [] for name in engines}
            for (name, _), completion in zip(asked, await asyncio.gather(*requests), strict=True):
                found[name].append(completion)
            scored = await asyncio.gather(*(engine.score(prompts[0], adapter=name) for name in engines))
            for name, logprobs in zip(engines, scored, strict=True):
                np.testing.assert_allclose(logprobs, merged[name].score_ids(prompts[0]), atol=1e-3)
            with pytest.raises(ValueError, match="no adapter 'eve'; it was started with: ann, ben"):
                engine.with_adapter("eve")
        finally:
            await engine.close()
        return found

    for name, completions in asyncio.run(run()).items():
        for prompt, completion in zip(prompts * 2, completions, strict=True):
            ids = prompt + completion.token_ids.tolist()
            for other, policy in merged.items():
                difference = np.abs(policy.score_ids(ids)[len(prompt) - 1 :] - completion.logprobs)
                assert difference.max() < 1e-3 if other == name else difference.mean() > 0.05


def test_what_is_no_adapter_or_not_of_the_model_is_refused(tmp_path: Path) -> None:
    base, other = tmp_path / "base", tmp_path / "other"
    for folder, layers in ((base, 1), (other, 2)):
        build_tiny(
            folder, build_tokenizer(folder), layers=layers, width=64, heads=2, mlp=128, context=CONTEXT
        )
    policy = adapted(other, tmp_path / "ann", PEOPLE["ann"], 0)
    assert (
        policy.adapter is not None and AdapterSpec.read(tmp_path / "ann" / "adapter") == policy.adapter.spec
    )
    for folder, says in (
        (base, "describes no adapter"),
        (tmp_path / "ann" / "adapter", "has no tensor model.layers.1"),
    ):
        with pytest.raises(ValueError, match=says) as refused:
            asyncio.run(
                VllmEngine.start(
                    "rollout-0", str(base), [0], CONTEXT, VllmSettings(), adapters={"ann": folder}
                )
            )
        assert "\n" not in str(refused.value)
