"""Published families end to end on small models: loaded, scored as transformers does, trained, synced, saved."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from deploy.assembly.build import load_chat
from deploy.run.model_checks import check_context, check_model, check_tokenizer, check_trainable, loaded
from learner.algorithm.schedule import OptimSettings
from learner.data.batch import MicroBatch, TokenSequence, row_of
from learner.model.policy import Policy
from learner.settings import LearnerSettings, ModelSettings
from learner.training.learner import Learner
from learner.training.publish import take_snapshot
from rollout.engines.engine import Sampling
from rollout.engines.hf_engine import HfEngine
from rollout.engines.vllm_checkpoint import checkpoint_names
from rollout.wire.model_folder import token_count
from rollout.wire.trajectory import Group
from rollout.wire.weights import WeightUpdate, inline
from tests.families import PADDING, PUBLISHED, build_family
from tests.smollm2 import FOLDER, needs_smollm2

IDS = np.random.default_rng(0).integers(5, 100, 40).tolist()  # longer than the windows


def plain(folder: Path) -> PreTrainedModel:
    """transformers' own model with its plain attention."""
    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    return loaded.eval()


@torch.no_grad()
def logits(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    """Before every token after the first: [T - 1, V]."""
    found: torch.Tensor = model(torch.tensor([ids])).logits[0, :-1]
    return found


def chosen(logits_TV: torch.Tensor, ids: list[int]) -> NDArray[np.float32]:
    """The logprob of every token after the first."""
    return np.asarray(logits_TV.log_softmax(-1).gather(1, torch.tensor(ids)[1:, None])[:, 0])


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", PUBLISHED)
def test_a_family_is_scored_as_by_transformers_trained_and_synced(
    family: str, tie: bool, tmp_path: Path, group_of: Callable[..., Group]
) -> None:
    build_family(family, tie, folder := tmp_path / "model")
    path = check_model(str(folder))
    architecture = loaded(AutoConfig, path)
    check_trainable(path, architecture)
    check_context(path, 256, architecture)
    check_tokenizer(path)
    assert len(load_chat(path).stops) == 2, "the template's end and the other one that the model's files list"
    model = ModelSettings(path=path)
    learner = Learner(LearnerSettings(model=model, optim=OptimSettings(learning_rate=1e-2)))
    policy = learner.policy
    original = plain(folder)
    np.testing.assert_allclose(policy.score_ids(IDS), chosen(logits(original, IDS), IDS), atol=2e-5)
    row = learner.step([group_of(0, [1.0, 0.0]), group_of(1, [0.0, 1.0])])
    assert np.isfinite(row["grad_norm"]) and row["grad_norm"] > 0
    update = published(policy)
    names = [spec.name for spec in update.manifest.tensors]
    stored = load_file(folder / "model.safetensors")
    assert set(names) == stored.keys() - ({"lm_head.weight"} if tie else set())
    assert {spec.name: spec.shape for spec in update.manifest.tensors} == {
        name: tuple(stored[name].shape) for name in names
    }
    update.manifest.require_names(checkpoint_names(path), "rollout-0")
    engine = HfEngine.load(path, load_chat(path).stops)
    report = asyncio.run(engine.sync(update))
    assert (report.version, report.tensors) == (1, len(names))
    np.testing.assert_allclose(asyncio.run(engine.score(IDS)), policy.score_ids(IDS), atol=2e-5)
    policy.save(tmp_path / "saved")
    saved = plain(tmp_path / "saved")
    assert not np.allclose(chosen(logits(saved, IDS), IDS), chosen(logits(original, IDS), IDS), atol=1e-3)
    np.testing.assert_allclose(policy.score_ids(IDS), chosen(logits(saved, IDS), IDS), atol=2e-5)


def published(policy: Policy) -> WeightUpdate:
    snapshot = take_snapshot(policy, 1, "float32")
    return WeightUpdate(snapshot.manifest, inline(snapshot.arrays))


def prefer_padding(folder: Path) -> None:
    """Let the rows that no token has win in half of all places."""
    stored = load_file(folder / "model.safetensors")
    for name in {"model.embed_tokens.weight", "lm_head.weight"} & stored.keys():
        stored[name][-PADDING:] *= 30
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
def test_ids_beyond_the_tokenizer_are_never_sampled_and_the_learner_knows(tmp_path: Path, tie: bool) -> None:
    tokens = build_family("Qwen3-0.6B", tie, tmp_path)
    prefer_padding(tmp_path)
    assert token_count(str(tmp_path)) == tokens
    model = plain(tmp_path)
    beyond = logits(model, IDS).log_softmax(-1)[:, tokens:].exp().sum(-1)
    assert beyond.mean() > 0.3, "the model itself would sample them"
    engine = HfEngine.load(str(tmp_path), [])
    completion = asyncio.run(engine.generate(IDS, Sampling(max_tokens=100, temperature=0.8, seed=0)))
    ids = IDS + completion.token_ids.tolist()
    assert max(ids) < tokens
    load_chat(str(tmp_path)).text(completion.token_ids)
    known = chosen(logits(model, ids)[:, :tokens] / 0.8, ids)[len(IDS) - 1 :]
    np.testing.assert_allclose(completion.logprobs, known, atol=1e-4)
    policy = Policy(ModelSettings(path=str(tmp_path)))
    with torch.no_grad():
        logprobs_N, entropy_N = policy.score(_row(ids), 0.8)
    logprobs_NV = (logits(model, ids)[:, :tokens] / 0.8).log_softmax(-1)
    np.testing.assert_allclose(logprobs_N, chosen(logprobs_NV, ids), atol=1e-4)
    torch.testing.assert_close(entropy_N, -(logprobs_NV.exp() * logprobs_NV).sum(-1), atol=1e-4, rtol=0)
    assert np.isfinite(policy.score_ids([1, 2, tokens + 3])).all(), (
        "a probe may hold any row of the vocabulary"
    )


def _row(ids: list[int]) -> MicroBatch:
    """One sequence, sampled from its second token on."""
    zeros_T = np.zeros(len(ids), np.float32)
    sampled_T = np.arange(len(ids)) > 0
    return row_of(
        [TokenSequence(np.array(ids, np.int32), sampled_T, zeros_T, zeros_T, zeros_T.astype(np.int32))]
    )


@needs_smollm2
def test_every_row_of_the_real_smollm2_is_a_token() -> None:
    assert token_count(str(FOLDER)) == 49_152
