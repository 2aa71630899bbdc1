"""Published families through the real vLLM: synced, scored as the learner does, sampling tokens only."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest

from learner.model.policy import Policy
from learner.settings import ModelSettings
from learner.training.publish import take_snapshot
from rollout.engines.engine import Sampling
from rollout.engines.vllm_engine import VllmEngine
from rollout.engines.vllm_start import VllmSettings
from rollout.wire.weights import WeightUpdate, write_memory
from tests.families import PUBLISHED, build_family, shake
from tests.learner.model.test_families import IDS, chosen, logits, plain, prefer_padding

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

CONTEXT = 192
EVERY_TIME = ("Qwen3-30B-A3B", False)  # the others are rare: a dense one is in test_vllm_checkpoint.py
CASES = [
    pytest.param(
        *(family, tie),
        marks=[] if (family, tie) == EVERY_TIME else [pytest.mark.rare],
        id=f"{family}-{'tied' if tie else 'untied'}",
    )
    for family in PUBLISHED
    for tie in (True, False)
]


@pytest.mark.parametrize(("family", "tie"), CASES)
def test_vllm_follows_the_learner_and_samples_tokens_only(family: str, tie: bool, tmp_path: Path) -> None:
    tokens = build_family(family, tie, tmp_path / "model")
    prefer_padding(tmp_path / "model")
    policy = Policy(ModelSettings(path=str(tmp_path / "model")))
    shake(policy.parameters())
    policy.save(tmp_path / "moved")
    snapshot = take_snapshot(policy, 1, "float32")
    handle, alive = write_memory(snapshot.arrays)
    settings = VllmSettings(dtype="float32", kv_cache_gib=0.25, max_num_seqs=16)

    async def run() -> None:
        engine = await VllmEngine.start("rollout-0", str(tmp_path / "model"), [], CONTEXT, settings)
        try:
            report = await engine.sync(WeightUpdate(snapshot.manifest, handle))
            assert report.tensors == len(snapshot.manifest.tensors)
            np.testing.assert_allclose(await engine.score(IDS), policy.score_ids(IDS), atol=1e-4)
            asked = Sampling(max_tokens=100, temperature=0.8)
            completions = await asyncio.gather(*(engine.generate(IDS, asked) for _ in range(4)))
        finally:
            await engine.close()
        model = plain(tmp_path / "moved")
        for completion in completions:
            ids = IDS + completion.token_ids.tolist()
            assert max(ids) < tokens
            known = chosen(logits(model, ids)[:, :tokens] / 0.8, ids)[len(IDS) - 1 :]
            np.testing.assert_allclose(completion.logprobs, known, atol=1e-3)

    asyncio.run(run())
    del alive
