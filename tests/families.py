"""Tiny random models of six families: the configurations of published checkpoints, but small.

Every field is as published, also in older names, except sizes of layers, experts and windows, the number of positions,
and the ids of control tokens. As published too, the vocabulary has more rows than the tokenizer has tokens.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from learner.model.tokenizer import build_tokenizer

PADDING = 27  # rows of the vocabulary that no token has

_SMALL = {
    "vocab_size": 0,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "Qwen2.5-0.5B-Instruct": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_window_layers": 21,
        "num_attention_heads": 2,  # of 32, the least that vLLM on CPUs has: the size is no field of its own here
        "num_key_value_heads": 1,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "use_sliding_window": False,
    },
    "Qwen3-0.6B": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "head_dim": 32,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_window_layers": 28,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "use_sliding_window": False,
    },
    "Qwen3-30B-A3B": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "decoder_sparse_step": 1,
        "head_dim": 32,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_window_layers": 48,
        "mlp_only_layers": [],
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "output_router_logits": False,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.001,
        "sliding_window": None,
        "use_sliding_window": False,
    },
    "Llama-3.2-1B-Instruct": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "head_dim": 32,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "mlp_bias": False,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 64,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
    },
    "gemma-3-1b-it": {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_logit_softcapping": None,
        "cache_implementation": "hybrid",
        "final_logit_softcapping": None,
        "head_dim": 32,
        "hidden_activation": "gelu_pytorch_tanh",
        "initializer_range": 0.02,
        "num_hidden_layers": 6,  # five with the window, one without
        "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-06,
        "rope_local_base_freq": 10000,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": 16,
        "sliding_window_pattern": 6,
    },
    "Mistral-7B-Instruct-v0.1": {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "head_dim": 32,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "sliding_window": 16,
    },
}


def build_family(family: str, tie: bool, folder: Path, **fields: Any) -> int:
    """Write a random model of a family and a tokenizer; returns the number of the tokenizer's tokens.

    fields: of its configuration, in place of the published ones.

    A tied model's file holds `lm_head.weight` too, as some publishers store it. The file has the names that
    transformers writes, which are those of the published checkpoints.
    """
    tokenizer = build_tokenizer(folder, ("left", "down", "right", "up"))
    tokens = len(tokenizer)
    config = {
        **_SMALL,
        **PUBLISHED[family],
        "vocab_size": tokens + PADDING,
        "tie_word_embeddings": tie,
    } | fields
    end, turn = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|user|>")
    config |= {
        "bos_token_id": None,
        "eos_token_id": end,
        "pad_token_id": tokenizer.pad_token_id,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).float()
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.1)
            else:
                parameter.data.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    # transformers has written its own names into the configuration; it is to be read as published.
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    ends = {"eos_token_id": [end, turn], "do_sample": True, "temperature": 0.6, "top_p": 0.95}
    (folder / "generation_config.json").write_text(json.dumps(ends), encoding="utf-8")
    if tie:
        file = folder / "model.safetensors"
        stored = load_file(file)
        stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone()
        save_file(stored, file, metadata={"format": "pt"})
    return tokens


@torch.no_grad()
def shake(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Add a little noise to a model's parameters, the same every time: the next version of a policy."""
    for place, parameter in enumerate(parameters):
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(place))
        parameter.add_(noise, alpha=0.02)
