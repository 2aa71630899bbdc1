"""An adapter of experts: what it changes is what PEFT's own computes, and what engines are given."""

from __future__ import annotations

import json
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, GptOssConfig

from learner.algorithm.schedule import OptimSettings
from learner.data.batch import Batch, TokenSequence, pack
from learner.model.footprint import blank_model, shape_of
from learner.model.loading import ModelError
from learner.model.lora import Adapter
from learner.model.lora_targets import Sizes, chosen, planned
from learner.model.policy import Policy
from learner.model.routers import routers_in
from learner.model.saved_tensors import SavedTensors
from learner.parallel.ranks import ALONE, Ranks
from learner.settings import LearnerSettings, LoraSettings, ModelSettings
from learner.training.memory_estimate import learner_amounts
from learner.training.optim import Optimizer
from learner.training.step import accumulate
from rollout.wire.adapter import AdapterSpec
from tests.families import build_family
from tests.learner.adapted import learn, logprobs, plain
from tests.learner.ranked import plain as arrays
from tests.learner.together import together

IDS = list(range(3, 30))
LORA: dict[str, Any] = {"rank": 3, "alpha": 5}
MORE: dict[str, dict[str, Any]] = {
    "afmoe": {"num_dense_layers": 1, "head_dim": 8},
    "jamba": {"mamba_dt_rank": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_offset": 1},
}
TEXTS = [IDS[:12], IDS[3:9], IDS[7:20], IDS[11:16]]


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3-MoE of two layers."""
    folder = tmp_path_factory.mktemp("sparse")
    build_family("Qwen3-30B-A3B", False, folder, num_hidden_layers=2)
    return folder


def _policy(folder: Path, ranks: Ranks = ALONE, **model: Any) -> Policy:
    """One whose adapter has learned something: B is no longer zeros."""
    policy = Policy(ModelSettings.model_validate({"path": str(folder), "lora": LORA} | model), ranks)
    learn(policy.parameters())
    return policy


def test_all_linear_adapts_every_matrix_of_experts_and_no_router(sparse: Path) -> None:
    spec = planned(str(sparse), LoraSettings(**LORA))
    assert spec.experts == tuple(
        f"model.layers.{layer}.mlp.experts.{name}_proj" for layer in (0, 1) for name in ("gate_up", "down")
    )
    assert {layer.rpartition(".")[2] for layer in spec.layers} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    trained = {id(parameter) for parameter in _policy(sparse).parameters()}
    assert len(trained) == 2 * 2 * (4 + 2)
    with pytest.raises(ValueError, match="'gate' is no linear layer that can be adapted"):
        planned(str(sparse), LoraSettings(targets=("gate",)))


@pytest.mark.parametrize(
    ("kind", "routers"), [("phimoe", "router"), ("afmoe", "router.gate"), ("jamba", "router")]
)
def test_routers_that_are_linear_layers_are_left_as_they_are(kind: str, routers: str) -> None:
    small = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
    mixed = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    config = CONFIG_MAPPING[kind](**small, **heads, **mixed, **MORE.get(kind, {}))
    model = AutoModelForCausalLM.from_config(config)
    found = chosen(model, LoraSettings(targets=("q_proj", "gate_up_proj")))
    assert found.experts and found.layers
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    named = {name for name in linear if name.endswith(f".{routers}")}
    left = {name for name, module in model.named_modules() if module in routers_in(model)}
    assert named and named <= left and all(routers.partition(".")[0] in name.split(".") for name in left)


def test_a_name_of_dense_layers_and_of_experts_means_both(tmp_path: Path) -> None:
    build_family("Qwen3-30B-A3B", False, tmp_path, num_hidden_layers=2, mlp_only_layers=[0])
    spec = planned(str(tmp_path), LoraSettings(targets=("down_proj",)))
    assert (spec.layers, spec.experts) == (
        ("model.layers.0.mlp.down_proj",),
        ("model.layers.1.mlp.experts.down_proj",),
    )


def test_merged_experts_and_peft_s_own_score_as_the_policy_does(sparse: Path, tmp_path: Path) -> None:
    policy = _policy(sparse)
    shapes, merged = dict(policy.weight_shapes()), dict(policy.named_weights())
    stored = load_file(sparse / "model.safetensors")
    assert merged.keys() == stored.keys() and list(shapes) == list(merged)
    assert {name: tensor.shape for name, tensor in merged.items()} == shapes
    changed = {name for name, tensor in merged.items() if not torch.equal(tensor, stored[name].float())}
    assert changed == {name for name in stored if name.endswith("_proj.weight")}
    policy.save(tmp_path)
    expected = policy.score_ids(IDS)
    assert np.abs(expected - logprobs(plain(sparse), IDS)).mean() > 0.01
    np.testing.assert_allclose(expected, logprobs(plain(tmp_path), IDS), atol=2e-5)
    theirs = PeftModel.from_pretrained(plain(sparse), str(tmp_path / "adapter"))
    np.testing.assert_allclose(expected, logprobs(theirs, IDS), atol=2e-5)
    again = Policy.restored(policy.settings, tmp_path)
    np.testing.assert_array_equal(again.score_ids(IDS), expected)


def test_experts_stored_the_other_way_round_are_merged_as_peft_merges_them(tmp_path: Path) -> None:
    small = {
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "head_dim": 8,
    }
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    config = GptOssConfig(**small, **heads, num_local_experts=4, num_experts_per_tok=2, pad_token_id=0)
    ours, theirs = (AutoModelForCausalLM.from_config(config).float() for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    adapter = Adapter(ours, LoraSettings(**LORA))
    learn(adapter.parameters())
    merged = dict(adapter.merged(ours.named_parameters()))
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapter.spec.config()))
    save_file({n: t.contiguous() for n, t in adapter.tensors()}, tmp_path / "adapter_model.safetensors")
    whole = PeftModel.from_pretrained(theirs, str(tmp_path)).merge_and_unload()
    for name, tensor in whole.named_parameters():
        torch.testing.assert_close(merged[name], tensor, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss", "dense"])
@pytest.mark.parametrize("rank", [3, 16, 200])
def test_moments_of_an_adapter_in_eight_bits_are_told_to_the_byte(kind: str, rank: int) -> None:
    small = {"vocab_size": 40, "hidden_size": 96, "intermediate_size": 144, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 48, "pad_token_id": 0}
    mixed = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 80}
    config = CONFIG_MAPPING["qwen3" if kind == "dense" else kind](
        **small, **heads, **({} if kind == "dense" else mixed)
    )
    settings = LoraSettings(rank=rank)
    shape, sizes = shape_of(blank_model(config)), Sizes.of(blank_model(config), settings)
    adapter = Adapter(AutoModelForCausalLM.from_config(config).float(), settings)
    optimizer = Optimizer(adapter.parameters(), OptimSettings(moments="8bit"))
    *stored, _ = optimizer.moments_to_come()  # the last one is a part that is updated
    learner = LearnerSettings(
        model=ModelSettings(path="model", lora=settings), optim=OptimSettings(moments="8bit")
    )
    amounts = {each.what: each.nbytes for each in learner_amounts(learner, shape, sizes, None, 64)}
    assert sizes.adapter == sum(parameter.numel() for parameter in adapter.parameters())
    assert amounts["AdamW's moments, 8 bits a number"] == sum(each.nbytes for each in stored)


def test_gradients_of_an_expert_s_adapter_are_those_of_its_matrices(sparse: Path) -> None:
    """By the chain rule: d/dB of W + s B A is s dW A^T, that of A is s B^T dW."""
    policy = _policy(sparse)
    ids = torch.tensor([IDS])
    model = policy.model
    loss = model(ids).logits.float().square().mean()
    loss.backward()
    whole = plain(sparse)
    weights = dict(policy.adapter.merged(model.named_parameters())) if policy.adapter else {}
    with torch.no_grad():
        for name, parameter in whole.named_parameters():
            parameter.copy_(weights[name])
    whole(ids).logits.float().square().mean().backward()
    scale, rank = LORA["alpha"] / LORA["rank"], LORA["rank"]
    experts = model.get_submodule("model.layers.1.mlp.experts")
    for wrapped, name in ((experts, "down_proj"), (experts.base_layer, "gate_up_proj")):
        a, b = wrapped.lora_A.default.weight, wrapped.lora_B.default.weight
        gradient_EVD = whole.get_submodule("model.layers.1.mlp.experts").get_parameter(name).grad
        assert gradient_EVD is not None
        for expert, gradient_VD in enumerate(gradient_EVD):
            rows, columns = slice(rank * expert, rank * (expert + 1)), slice(expert, None, len(gradient_EVD))
            a_RD, b_VR = a[rows], b[:, columns]
            torch.testing.assert_close(a.grad[rows], scale * b_VR.T @ gradient_VD, atol=1e-7, rtol=1e-4)
            torch.testing.assert_close(b.grad[:, columns], scale * gradient_VD @ a_RD.T, atol=1e-7, rtol=1e-4)


def test_what_a_row_keeps_is_what_the_estimate_counts(sparse: Path) -> None:
    """W + s B A of every layer's experts, in float32; recomputed layers keep none of it."""
    tokens = pack([_sequence(IDS)], 64, 64).micro_batches[0]
    kept = {}
    for recompute in (False, "selective"):
        for targets in ("all-linear", ("q_proj", "k_proj", "v_proj", "o_proj")):
            policy = _policy(sparse, lora=LORA | {"targets": targets}, gradient_checkpointing=recompute)
            saved = SavedTensors(policy.model.parameters())
            with saved:
                policy.score(tokens, 1.0)
            kept[recompute, targets == "all-linear"] = saved.nbytes
    size = 4 * Sizes.of(plain(sparse), LoraSettings(**LORA)).experts
    assert size <= kept[False, True] - kept[False, False] < 1.2 * size  # beside it A and B, turned
    assert kept["selective", True] - kept["selective", False] < 0.1 * size


def test_an_adapter_of_experts_is_not_sent_or_served_alone(sparse: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"sync='adapter' cannot send the adapters of experts .*'merged'"):
        _policy(sparse, lora=LORA | {"sync": "adapter"})
    assert not planned(str(sparse), LoraSettings(targets=("q_proj",), sync="adapter")).experts
    _policy(sparse).save(tmp_path)
    with pytest.raises(ValueError, match=r"changes experts .*do not serve"):
        AdapterSpec.read(tmp_path / "adapter")


def _sequence(ids: list[int]) -> TokenSequence:
    """One whose last four tokens were sampled."""
    count = len(ids)
    return TokenSequence(
        token_ids_T=np.asarray(ids, np.int32),
        sampled_T=np.arange(count) >= count - 4,
        behavior_logprobs_T=np.zeros(count, np.float32),
        advantages_T=np.ones(count, np.float32),
        versions_T=np.zeros(count, np.int32),
    )


def _scored(ranks: Ranks, folder: Path, model: dict[str, Any]) -> tuple[list[Any], list[Any]]:
    """Gradients of texts that are dealt to the ranks, and what is published."""
    policy = _policy(folder, ranks, **model)
    own = TEXTS[ranks.share.rank :: ranks.share.ranks]
    batch: Batch = pack([_sequence(ids) for ids in own], 16, policy.context)
    accumulate(policy, batch, lambda micro: (policy.score(micro, 1.0)[0], {}))
    return arrays(p.grad for p in policy.parameters()), [
        tensor.numpy() for _, tensor in policy.named_weights()
    ]


NF4 = {"lora": LORA | {"quantize_base": "nf4"}}


@pytest.mark.parametrize(
    ("size", "over", "context", "model"),
    [
        (2, None, 1, {"gradient_checkpointing": "selective"}),
        (2, None, 2, {}),
        (4, 2, 2, NF4 | {"gradient_checkpointing": True}),
    ],
    ids=str,
)
def test_ranks_learn_and_publish_what_one_does(
    sparse: Path, size: int, over: int | None, context: int, model: dict[str, Any]
) -> None:
    expected = _scored(ALONE, sparse, model)
    for found in together(size, _scored, sparse, model, over=over, context=context):
        for ours, alone in zip(found, expected, strict=True):
            for left, right in zip_longest(ours, alone):
                np.testing.assert_allclose(left, right, atol=1e-5)
