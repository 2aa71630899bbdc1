"""An adapter on a base in NF4 learns, publishes and resumes as one on the dequantized model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoConfig

from learner.data.batch import longest_row
from learner.model import loading, nf4
from learner.model.footprint import blank_model, shape_of
from learner.model.loading import ModelError
from learner.model.nf4 import Nf4Linear, quantize_layers
from learner.model.policy import Policy
from learner.model.tiny import build_tiny
from learner.model.tokenizer import build_tokenizer
from learner.settings import LearnerSettings, ModelSettings
from learner.training.learner import Learner
from learner.training.memory_estimate import base_bytes
from learner.training.publish import take_snapshot
from tests.families import build_family
from tests.learner.conftest import GroupOf

NF4 = {"rank": 4, "alpha": 8, "quantize_base": "nf4"}
PLAIN = {"rank": 4, "alpha": 8}


@pytest.fixture(autouse=True)
def one_path_of_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain layers compute as those in NF4 do, whatever processor this is."""
    monkeypatch.setenv("MANTA_LINEAR", "torch")


def _settings(folder: Path, lora: dict[str, Any], **model: Any) -> ModelSettings:
    return ModelSettings.model_validate({"path": str(folder), "lora": lora, **model})


def _learned(policy: Policy) -> Policy:
    """With an adapter that has learned something: the same one for every policy of a shape."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return policy


@pytest.mark.parametrize(
    "model",
    [{}, {"dtype": "bfloat16"}, {"dtype": "bfloat16", "gradient_checkpointing": "selective"}],
    ids=["float32", "bfloat16", "recomputed"],
)
@pytest.mark.parametrize("mixed", [False, True], ids=["dense", "mixture"])
def test_it_is_an_adapter_on_the_dequantized_model_to_the_bit(
    tiny: Path, tmp_path_factory: pytest.TempPathFactory, mixed: bool, model: dict[str, Any]
) -> None:
    folder, tmp_path = tiny, tmp_path_factory.mktemp("dequantized")
    if mixed:
        folder = tmp_path_factory.mktemp("mixture")
        build_family("Qwen3-30B-A3B", False, folder)
    quantized = Policy(_settings(folder, NF4, **model))
    quantized.save(tmp_path)  # B is zeros: the base that it computes with
    policies = [_learned(quantized), _learned(Policy(_settings(tmp_path, PLAIN, **model)))]
    row, found = longest_row(20, 60), []
    for policy in policies:
        logprobs_N, entropy_N = policy.score(row, 0.8)
        (entropy_N * 0.1 - logprobs_N).sum().backward()
        gradients = [parameter.grad for parameter in policy.parameters()]
        found.append((logprobs_N.detach(), gradients, take_snapshot(policy, 0, "bfloat16").manifest))
    (logprobs_N, gradients, manifest), (want_N, want, expected) = found
    assert torch.equal(logprobs_N, want_N)
    # Two layers: seven matrices each, or four and two of experts.
    assert len(gradients) == 2 * 2 * (6 if mixed else 7) and all(map(torch.equal, gradients, want))
    assert manifest == expected, "checksums of the merged weights, the probe, and its tolerance"


def test_every_linear_layer_but_the_head_is_quantized_and_an_eighth_of_float32(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(tmp_path)
    build_tiny(tmp_path, tokenizer, layers=2, width=128, heads=2, mlp=256, tie=False)
    settings = LearnerSettings(model=_settings(tmp_path, NF4 | {"targets": ["q_proj"]}))
    policy = Policy(settings.model)
    stored = {name for name, parameter in policy.model.named_parameters() if parameter.dtype == torch.uint8}
    plain = blank_model(AutoConfig.from_pretrained(tmp_path))
    linear = {n for n, each in plain.named_modules() if isinstance(each, nn.Linear) and n != "lm_head"}
    assert {name.removesuffix(".weight").replace(".base_layer", "") for name in stored} == linear
    frozen = sum(p.nbytes for p in policy.model.parameters() if not p.requires_grad)
    assert base_bytes(settings, shape_of(plain)) == pytest.approx(frozen, abs=8 * len(stored))
    matrices = sum(policy.model.get_parameter(name).nbytes for name in stored)
    assert shape_of(plain).linear * 4 / matrices == pytest.approx(32 / 4.127, rel=2e-3)


def test_no_more_than_a_layer_is_held_in_the_type_of_the_files(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = []

    def watched(model: nn.Module, leave: nn.Module | None) -> None:
        layers = [each for each in model.modules() if type(each) is nn.Linear and each is not leave]
        held.append(sum(each.weight.nbytes for each in layers if not each.weight.is_meta))
        quantize_layers(model, leave)

    monkeypatch.setattr(loading, "quantize_layers", watched)
    policy = Policy(_settings(tiny, NF4))
    layer = policy.model.get_submodule("model.layers.0")
    largest = sum(4 * each.shape.numel() for each in layer.modules() if isinstance(each, Nf4Linear))
    assert max(held) == largest and sum(held) == 2 * largest, "read layer by layer, each once"


@pytest.mark.parametrize(
    "algorithm",
    [
        {"kl": {"coefficient": 0.1}, "skip_zero_advantage": False},
        {"advantage": {"kind": "gae"}, "critic": {"optim": {"learning_rate": 1e-2}}},
    ],
    ids=["kl", "critic"],
)
def test_a_resumed_run_is_bit_identical_and_the_base_stays(
    tiny: Path, tmp_path: Path, group_of: GroupOf, algorithm: dict[str, Any]
) -> None:
    settings = LearnerSettings.model_validate(
        {
            "model": {"path": str(tiny), "lora": NF4, "dtype": "bfloat16"},
            "optim": {"learning_rate": 3e-2, "warmup_steps": 2},
            "algorithm": algorithm,
            "tokens_per_microbatch": 40,
        }
    )
    batches = [[group_of(10 * s + g, [1.0, 0.0, 0.5]) for g in range(2)] for s in range(4)]
    straight, expected = Learner(settings), []
    base = [p.clone() for p in straight.policy.model.parameters() if not p.requires_grad]
    straight.save(tmp_path)
    for version, groups in enumerate(batches):
        if version == 2:
            straight.save(tmp_path)
        expected.append(straight.step(groups))
    assert np.isfinite([*expected[-1].values()]).all()
    after = [p for p in straight.policy.model.parameters() if not p.requires_grad]
    assert all(map(torch.equal, base, after)) and any(p.dtype == torch.uint8 for p in after)
    resumed = Learner(settings)
    resumed.load(tmp_path)
    assert [resumed.step(groups) for groups in batches[2:]] == expected[2:]
    states = straight.policy.model.state_dict(), resumed.policy.model.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(map(torch.equal, states[0].values(), states[1].values()))


def test_numbers_that_are_not_finite_are_refused_by_name(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def broken(matrix: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return quantize(matrix * float("nan") if len(calls) == 3 else matrix)

    quantize = nf4.quantize
    monkeypatch.setattr(nf4, "quantize", broken)
    with pytest.raises(
        ModelError, match=r"layers\.0\.self_attn\.v_proj\.weight has numbers that are not finite; use"
    ):
        Policy(_settings(tiny, NF4))
