"""Which families are trained and which are refused: small models of them, with weights that say something."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from learner.model.attention import register
from learner.model.compatibility import IncompatibleModel, require_compatible
from learner.model.loading import ModelError
from learner.model.policy import Policy
from learner.settings import ModelSettings

SHAPE = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
NO_CONTEXT = {"max_position_embeddings": None}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_expand": 2}
STATES = {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1} | NO_CONTEXT
BOTH = ["linear_attention", "full_attention"]
DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": BOTH,
}

FIT: list[tuple[str, dict[str, Any]]] = [
    ("qwen3", {}),
    ("llama", {}),
    ("mistral", {"sliding_window": 4}),
    ("mixtral", EXPERTS),
    ("gemma3_text", {"head_dim": 8, "sliding_window": 4}),
    ("olmo3", {"sliding_window": 4}),
    ("granite", {}),
    ("gpt2", {}),
    ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
]
LEAK: list[tuple[str, dict[str, Any]]] = [
    ("qwen3_next", DELTA | {"num_experts": 0, "head_dim": 8}),
    ("qwen3_5_text", DELTA | {"head_dim": 8}),
    ("olmo_hybrid", DELTA),
    ("lfm2", {"layer_types": ["conv", "full_attention"]}),
    ("minimax", EXPERTS | {"head_dim": 8, "layer_types": BOTH}),
    ("granitemoehybrid", MAMBA | EXPERTS | {"layer_types": ["mamba", "attention"]}),
    ("jamba", MAMBA | {"mamba_dt_rank": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 1}),
]
HEADS: list[tuple[str, dict[str, Any]]] = [
    ("granite", {"logits_scaling": 1.01}),
    ("cohere2", {"logit_scale": 0.0625}),
    ("gemma3_text", {"head_dim": 8, "final_logit_softcapping": 30.0}),
]


def built(kind: str, options: dict[str, Any], attention: str | None = None) -> PreTrainedModel:
    """A small model of the family, its logits far from equal. An option that is None is left to the family."""
    said = {name: value for name, value in (SHAPE | options).items() if value is not None}
    config = CONFIG_MAPPING[kind](**said)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval().float()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize(("kind", "options"), FIT, ids=[kind for kind, _ in FIT])
def test_a_family_of_attention_alone_and_a_linear_head_is_fit(kind: str, options: dict[str, Any]) -> None:
    require_compatible(built(kind, options, register()))


def test_experts_that_rounding_chooses_between_are_no_leak() -> None:
    model = built("mixtral", EXPERTS, register())
    generator = torch.Generator().manual_seed(0)

    @torch.no_grad()
    def round_anew(router: Any, given: Any) -> None:
        """Every expert is as good as any other, but for an error as small as that of rounding."""
        router.weight[:] = router.weight[0] * (
            1 + 1e-6 * torch.randn(router.weight.shape, generator=generator)
        )

    for layer in model.base_model.layers:
        layer.mlp.gate.register_forward_pre_hook(round_anew)
    require_compatible(model)


@pytest.mark.parametrize(("kind", "options"), LEAK, ids=[kind for kind, _ in LEAK])
def test_a_family_whose_tokens_meet_outside_of_attention_is_refused(
    kind: str, options: dict[str, Any]
) -> None:
    with pytest.raises(IncompatibleModel, match=f"{kind} lets a sequence see another one") as refused:
        require_compatible(built(kind, options, register()))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("kind", "options"), HEADS, ids=[kind for kind, _ in HEADS])
def test_a_head_that_scales_or_caps_is_refused_however_little(kind: str, options: dict[str, Any]) -> None:
    with pytest.raises(IncompatibleModel, match=f"{kind} has logits that are not hidden state times head"):
        require_compatible(built(kind, options, register()))


@pytest.mark.parametrize("path", ["onednn", "torch"])  # which of them is a processor's must not matter
@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        ("bloom", NO_CONTEXT, "bloom states no max_position_embeddings"),
        (
            "mpt",
            NO_CONTEXT | {"d_model": 32, "n_heads": 4, "n_layers": 2},
            "mpt states no max_position_embeddings",
        ),
        ("mamba2", STATES, "mamba2 states no max_position_embeddings"),
        (
            "recurrent_gemma",
            NO_CONTEXT | {"lru_width": 32},
            "recurrent_gemma states no max_position_embeddings",
        ),
        (
            "llama4_text",
            EXPERTS | {"head_dim": 8, "intermediate_size_mlp": 48},
            r"llama4_text cannot compute a packed row \(AttributeError: .*last_hidden_state",
        ),
        ("gpt_oss", EXPERTS | {"head_dim": 8}, r"gpt_oss cannot compute a packed row .*got \['s_aux'\]"),
        ("gptj", {"rotary_dim": 4}, "cannot be loaded: its family has its own attention code"),
        ("falcon", {}, "cannot be loaded: its family has its own attention code"),
    ],
)
def test_a_family_that_packed_rows_do_not_fit_is_one_line(
    kind: str, options: dict[str, Any], said: str, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MANTA_LINEAR", path)
    built(kind, options).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=f"{said}.*; choose a") as refused:
        Policy(ModelSettings(path=str(tmp_path)))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("path", ["onednn", "torch"])
@pytest.mark.parametrize(("kind", "options"), FIT, ids=[kind for kind, _ in FIT])
def test_a_family_that_is_fit_becomes_a_policy_by_either_path(
    kind: str, options: dict[str, Any], path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MANTA_LINEAR", path)
    model = built(kind, options)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        want_TV = model(torch.arange(9)[None]).logits[0].log_softmax(-1)
    want_T = want_TV[:-1].gather(1, torch.arange(1, 9)[:, None])[:, 0]
    found_T = Policy(ModelSettings(path=str(tmp_path))).score_ids(range(9))
    torch.testing.assert_close(torch.from_numpy(found_T), want_T, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("largest", [1.0, 25.0, 100.0])
def test_logits_may_be_of_any_size_under_bfloat16(largest: float, tmp_path: Path) -> None:
    model = built("qwen3", {"tie_word_embeddings": False})
    with torch.no_grad():
        logits_TV = model(torch.arange(9)[None]).logits
        model.lm_head.weight.mul_(largest / logits_TV.abs().max())
    model.save_pretrained(tmp_path)
    Policy(ModelSettings(path=str(tmp_path), dtype="bfloat16"))


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    model = built("qwen3", {})
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = torch.nan
    model.save_pretrained(tmp_path)
    with pytest.raises(
        ModelError, match=r"weights that are not finite, such as model\.layers\.0\.mlp\.up_proj"
    ):
        Policy(ModelSettings(path=str(tmp_path)))
