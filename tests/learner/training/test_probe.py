"""The probe that proves a sync: its text, its tolerance, which faults a sync finds. More: tests/bench/bench_probe."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from learner.model.policy import Policy
from learner.settings import LoraSettings, ModelSettings
from learner.training.probe import Rounding, probe_of
from learner.training.publish import take_snapshot
from rollout.engines.hf_engine import HfEngine
from rollout.wire.weights import WeightUpdate, inline
from tests.bench.bench_probe import FAULTS, study_transformers
from tests.smollm2 import FOLDER, needs_smollm2


def _difference(policy: Policy, folder: Path, dtype: str) -> tuple[float, float]:
    """What a sound engine's probe differs by, and what is allowed."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    snapshot = take_snapshot(policy, 0, dtype)
    report = asyncio.run(HfEngine(model, [0]).sync(WeightUpdate(snapshot.manifest, inline(snapshot.arrays))))
    return report.probe_difference, snapshot.manifest.probe.tolerance


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_sound_sync_passes_and_every_kind_of_fault_is_refused(tiny: Path, dtype: str) -> None:
    found = asyncio.run(study_transformers("tiny", tiny, "float32", dtype, 2))
    assert [sync for sync in found if not sync.right] == []
    assert [sync.kind for sync in found] == ["correct", *FAULTS] * 2


@needs_smollm2
@pytest.mark.slow
def test_a_pretrained_model_is_proved_in_either_type_by_a_learner_in_either() -> None:
    learner = Policy(ModelSettings(path=str(FOLDER), dtype="bfloat16"))
    for dtype, measured in (("float32", 1e-5), ("bfloat16", 0.05)):
        difference, allowed = _difference(learner, FOLDER, dtype)
        assert difference < allowed < 10 * measured, "the tolerance follows the precision of the engine"


def test_the_text_is_what_the_model_itself_would_write_and_stays_the_same(tiny: Path) -> None:
    policy = Policy(ModelSettings(path=str(tiny)))
    with torch.no_grad():  # so that it expects some tokens and not others
        policy.model.get_output_embeddings().weight.mul_(4)
    first = probe_of(policy, "float32")
    uniform = np.random.default_rng(0).integers(0, policy.vocab_size, len(first.token_ids)).tolist()
    assert np.mean(first.logprobs) > policy.score_ids(uniform).mean() + 1
    with torch.no_grad():
        policy.model.get_output_embeddings().weight.mul_(0.5)
    assert probe_of(policy, "bfloat16").token_ids == first.token_ids


def test_a_product_of_rounded_values_moves_as_far_as_bfloat16_moves_it() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(256, 512), torch.randn(64, 256)
    with torch.no_grad():
        exact = layer(x)
        with Rounding(2.0**-8, torch.Generator().manual_seed(0)):
            moved = layer(x)
    truth = (exact.bfloat16().float() - exact).abs().mean()
    assert truth < (moved - exact).abs().mean() < 3 * truth


def test_an_adapter_sent_alone_is_proved_in_bfloat16(tiny: Path) -> None:
    policy = Policy(ModelSettings(path=str(tiny), lora=LoraSettings(rank=2, sync="adapter")))
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    difference, allowed = _difference(policy, tiny, "bfloat16")
    assert difference < allowed
