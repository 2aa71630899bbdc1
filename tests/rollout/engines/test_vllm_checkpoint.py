"""The real vLLM on a checkpoint as published: more rows than tokens, and a tied head that its files hold too."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedModel

from learner.model.policy import Policy
from learner.model.tiny import build_tiny
from learner.model.tokenizer import build_tokenizer
from learner.settings import ModelSettings
from learner.training.publish import take_snapshot
from rollout.engines.engine import Completion, Sampling
from rollout.engines.vllm_engine import VllmEngine
from rollout.engines.vllm_start import VllmSettings, _logits_processors
from rollout.engines.vllm_vocabulary import PROCESSOR
from rollout.wire.weights import WeightUpdate, write_memory
from tests.families import build_family, shake
from tests.learner.model.test_families import IDS, chosen, logits, plain, prefer_padding

CONTEXT = 192
GREEDY = Sampling(max_tokens=24, temperature=0.0)
TEMPERED = Sampling(max_tokens=100, temperature=0.8, seed=5)
UNTEMPERED = Sampling(max_tokens=100, seed=6)


class Rig:
    """An engine and the learner's policy of a random Qwen3 with published habits, on one event loop."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tokens = build_family("Qwen3-0.6B", True, folder)
        prefer_padding(folder)
        self.loop = asyncio.new_event_loop()
        settings = VllmSettings(dtype="float32", kv_cache_gib=0.25, max_num_seqs=16, seeded=True)
        self.engine = self.loop.run_until_complete(
            VllmEngine.start("rollout-0", str(folder), [], CONTEXT, settings)
        )
        self.loop.run_until_complete(self.engine.adopt_loaded(0))

    def generate(self, *requests: Sampling) -> list[Completion]:
        async def run() -> list[Completion]:
            return await asyncio.gather(*(self.engine.generate(IDS, each) for each in requests))

        return self.loop.run_until_complete(run())

    def require_sampled(self, model: PreTrainedModel, completion: Completion, temperature: float) -> None:
        """The completion has tokens only, with their logprobs among the tokens by this model."""
        ids = IDS + completion.token_ids.tolist()
        assert len(ids) > len(IDS) + 20 and max(ids) < self.tokens
        known = chosen(logits(model, ids)[:, : self.tokens] / temperature, ids)[len(IDS) - 1 :]
        np.testing.assert_allclose(completion.logprobs, known, atol=1e-3)


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    made = Rig(tmp_path_factory.mktemp("published") / "model")
    yield made
    made.loop.run_until_complete(made.engine.close())
    made.loop.close()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_greedy_or_drawn_alone_or_together_only_tokens_are_sampled(rig: Rig) -> None:
    model = plain(rig.folder)
    (alone,) = rig.generate(GREEDY)  # a batch of greedy requests takes another way through the sampler
    greedy, tempered, untempered = rig.generate(GREEDY, TEMPERED, UNTEMPERED)
    scored_TV = logits(model, IDS + greedy.token_ids.tolist())[len(IDS) - 1 :]
    padded = scored_TV.argmax(-1) >= rig.tokens
    assert padded.float().mean() > 0.2, "the model itself would take rows that no token has"
    likeliest = scored_TV[:, : rig.tokens].argmax(-1).tolist()
    assert greedy.token_ids.tolist() == alone.token_ids.tolist() == likeliest
    for completion, temperature in ((alone, 1.0), (greedy, 1.0), (tempered, 0.8), (untempered, 1.0)):
        rig.require_sampled(model, completion, temperature)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_head_that_is_tied_and_stored_follows_its_embedding(rig: Rig) -> None:
    policy = Policy(ModelSettings(path=str(rig.folder)))
    shake(policy.parameters())
    before = rig.loop.run_until_complete(rig.engine.score(IDS))
    snapshot = take_snapshot(policy, 1, "float32")
    handle, alive = write_memory(snapshot.arrays)
    rig.loop.run_until_complete(rig.engine.sync(WeightUpdate(snapshot.manifest, handle)))
    del alive
    after = rig.loop.run_until_complete(rig.engine.score(IDS))
    assert np.abs(after - before).mean() > 0.01
    np.testing.assert_allclose(after, policy.score_ids(IDS), atol=1e-4)
    policy.save(rig.folder.with_name("moved"))
    (completion,) = rig.generate(TEMPERED)
    rig.require_sampled(plain(rig.folder.with_name("moved")), completion, 0.8)


def test_a_vocabulary_without_padding_is_not_masked(tmp_path: Path) -> None:
    build_tiny(tmp_path / "whole", build_tokenizer(tmp_path / "whole", ("up",)), layers=1, width=32)
    assert _logits_processors(str(tmp_path / "whole"), False) == []
    build_family("Qwen3-0.6B", True, tmp_path / "padded")
    assert _logits_processors(str(tmp_path / "padded"), False) == [PROCESSOR]
