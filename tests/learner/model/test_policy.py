from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, OPTConfig, OPTForCausalLM

from learner.data.batch import longest_row
from learner.model.linear import _OneDnnLinear, use_onednn
from learner.model.loading import ModelError
from learner.model.policy import Policy
from learner.model.tiny import build_tiny
from learner.settings import ModelSettings
from learner.training.publish import take_snapshot
from rollout.engines.hf_engine import HfEngine
from rollout.engines.vllm_checkpoint import checkpoint_names
from rollout.wire.weights import WeightUpdate, inline
from tests.smollm2 import FOLDER, needs_smollm2


def _reference(folder: Path, ids: list[int]) -> np.ndarray:
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        logprobs_TV = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return logprobs_TV[:-1].gather(1, torch.tensor(ids)[1:, None])[:, 0].numpy()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_score_ids_equals_plain_transformers(tiny: Path, checkpointing: bool) -> None:
    policy = Policy(ModelSettings(path=str(tiny), logit_block=300, gradient_checkpointing=checkpointing))
    ids = list(range(3, 40))
    logprobs = policy.score_ids(ids)
    assert logprobs.dtype == np.float32
    np.testing.assert_allclose(logprobs, _reference(tiny, ids), atol=1e-5)


def test_bfloat16_scores_stay_close_and_weights_stay_float32(tiny: Path) -> None:
    policy = Policy(ModelSettings(path=str(tiny), dtype="bfloat16"))
    ids = list(range(3, 40))
    np.testing.assert_allclose(policy.score_ids(ids), _reference(tiny, ids), atol=2e-2)
    assert {p.dtype for p in policy.parameters()} == {torch.float32}


@pytest.mark.parametrize("tie", [True, False])
def test_named_weights_are_the_checkpoint(tmp_path: Path, tiny: Path, tie: bool) -> None:
    build_tiny(tmp_path, AutoTokenizer.from_pretrained(tiny), layers=1, width=16, heads=2, mlp=8, tie=tie)
    weights = dict(Policy(ModelSettings(path=str(tmp_path))).named_weights())
    stored = load_file(tmp_path / "model.safetensors")
    assert ("lm_head.weight" in weights) == (not tie)
    assert weights.keys() == stored.keys()
    assert all(torch.equal(weights[name], stored[name]) for name in stored)


@pytest.mark.parametrize("same", [True, False])
def test_a_tied_model_whose_files_hold_a_head_besides(tmp_path: Path, tiny: Path, same: bool) -> None:
    build_tiny(tmp_path, AutoTokenizer.from_pretrained(tiny), layers=1, width=16, heads=2, mlp=8, tie=True)
    stored = load_file(tmp_path / "model.safetensors")
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone() + (0 if same else 1)
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    if not same:
        with pytest.raises(ModelError, match="tie_word_embeddings=true, but its files hold another head"):
            Policy(ModelSettings(path=str(tmp_path)))
        return
    snapshot = take_snapshot(Policy(ModelSettings(path=str(tmp_path))), 0, "bfloat16")
    snapshot.manifest.require_names(checkpoint_names(str(tmp_path)), "rollout-0")
    engine = HfEngine(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16), [0])
    asyncio.run(engine.sync(WeightUpdate(snapshot.manifest, inline(snapshot.arrays))))
    assert engine.version == 0


def test_a_tiny_model_knows_exactly_its_tokenizers_ids(tiny: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    policy = Policy(ModelSettings(path=str(tiny)))
    assert policy.vocab_size == len(tokenizer)
    assert policy.context == 128


def _break(folder: Path, how: str) -> None:
    weights, config = folder / "model.safetensors", folder / "config.json"
    if how == "truncated":
        weights.write_bytes(weights.read_bytes()[:500])
    elif how == "no weights":
        weights.unlink()
    elif how == "no folder":
        shutil.rmtree(folder)
    else:
        changed = json.loads(config.read_text(encoding="utf-8"))
        changed |= {"other shape": {"intermediate_size": 24}, "more layers": {"num_hidden_layers": 3}}[how]
        if how == "more layers":
            changed["layer_types"] = ["full_attention"] * 3
        config.write_text(json.dumps(changed), encoding="utf-8")


@pytest.mark.parametrize("how", ["truncated", "no weights", "no folder", "other shape", "more layers"])
def test_a_broken_checkpoint_is_one_line(tmp_path: Path, tiny: Path, how: str) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(tiny, folder)
    _break(folder, how)
    with pytest.raises(ModelError, match=r"broken.* (cannot be loaded|lacks)") as error:
        Policy(ModelSettings(path=str(folder)))
    assert "\n" not in str(error.value)


def test_layers_computed_again_are_computed_alike(tmp_path: Path) -> None:
    config = OPTConfig(
        vocab_size=40,
        hidden_size=16,
        ffn_dim=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        word_embed_proj_dim=16,
        dropout=0.5,
        attention_dropout=0.5,
        layerdrop=0.5,
    )
    OPTForCausalLM(config).save_pretrained(tmp_path)
    row = longest_row(12, 30)
    found = []
    for again in (False, True):
        policy = Policy(ModelSettings(path=str(tmp_path), gradient_checkpointing=again))
        calls = [0]
        layers = policy.model.model.decoder.layers
        for layer in layers:
            layer.fc1.register_forward_hook(lambda *_, counted=calls: counted.__setitem__(0, counted[0] + 1))
        logprobs_N, _ = policy.score(row, 1.0)
        logprobs_N.sum().backward()
        assert calls == [len(layers) * (2 if again else 1)]
        found.append([logprobs_N.detach(), *(p.grad for p in policy.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_a_model_without_layers_to_compute_again_is_one_line(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("learner.parallel.layers.GradientCheckpointingLayer", torch.nn.Bilinear)
    with pytest.raises(ModelError, match=r"set learner\.model.gradient_checkpointing=false"):
        Policy(ModelSettings(path=str(tiny), gradient_checkpointing=True))


@pytest.mark.parametrize(("width", "out"), [(6, 4), (4, 6)])
@pytest.mark.parametrize("bias", [True, False])
def test_onednn_layers_equal_torchs(
    width: int, out: int, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MANTA_LINEAR", "onednn")
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(width, out, bias=bias))
    x = torch.randn(2, 5, width, requires_grad=True)
    weights = list(model.parameters())
    want = model(x)
    want_grads = torch.autograd.grad(want.square().sum(), [x, *weights])
    use_onednn(model)
    got = model(x)
    got_grads = torch.autograd.grad(got.square().sum(), [x, *weights])
    assert next(model.parameters()) is weights[0]
    for mine, torchs in zip([got, *got_grads], [want, *want_grads], strict=True):
        torch.testing.assert_close(mine, torchs)


def _replaced(policy: Policy) -> int:
    return sum(type(module) is _OneDnnLinear for module in policy.model.modules())


@pytest.mark.parametrize(
    ("forced", "intel", "replaced"),
    [
        ("onednn", True, [True, True]),
        ("torch", False, [False] * 2),
        ("", True, [False] * 2),
        ("", False, [True, False]),
    ],
)
def test_large_layers_follow_the_processor_and_all_of_them_the_environment_variable(
    forced: str, intel: bool, replaced: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MANTA_LINEAR", forced)
    monkeypatch.setattr("learner.model.linear._mkl_knows_this_processor", lambda: intel)
    model = torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.Linear(256, 255))
    use_onednn(model)
    assert [type(layer) is _OneDnnLinear for layer in model] == replaced


def test_an_unknown_path_is_one_line(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MANTA_LINEAR", "mkl")
    with pytest.raises(ModelError, match=r"MANTA_LINEAR='mkl' .* neither 'onednn' nor 'torch'; unset it"):
        Policy(ModelSettings(path=str(tiny)))


def test_a_head_stays_what_it_is_where_the_base_is_the_whole_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MANTA_LINEAR", "onednn")
    model = torch.nn.ModuleDict({"mlp": torch.nn.Linear(4, 4), "lm_head": torch.nn.Linear(4, 6)})
    use_onednn(model, leave=model["lm_head"])
    assert [type(model[name]) for name in ("mlp", "lm_head")] == [_OneDnnLinear, torch.nn.Linear]


@needs_smollm2
def test_both_paths_score_a_real_model_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = AutoTokenizer.from_pretrained(FOLDER)("The capital of France is Paris.").input_ids
    found = []
    for forced in ("onednn", "torch"):
        monkeypatch.setenv("MANTA_LINEAR", forced)
        policy = Policy(ModelSettings(path=str(FOLDER)))
        assert bool(_replaced(policy)) == (forced == "onednn")
        found.append(policy.score_ids(ids))
    np.testing.assert_allclose(*found, atol=1e-4)
