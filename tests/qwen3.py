"""The public configurations of Qwen3 models, and their sizes by hand; no weights are needed."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Qwen3:
    """The numbers of a config.json."""

    width: int
    layers: int
    heads: int
    mlp: int
    tied: bool
    key_heads: int = 8
    head_width: int = 128
    vocabulary: int = 151936
    experts: int = 0  # of each layer, `mlp` wide; 0: a dense model

    @property
    def parameters(self) -> int:
        """Added up matrix by matrix."""
        attention = 2 * self.width * self.heads * self.head_width
        attention += 2 * self.width * self.key_heads * self.head_width
        norms = 2 * self.width + 2 * self.head_width
        router = self.experts * self.width
        layer = attention + max(self.experts, 1) * 3 * self.width * self.mlp + router + norms
        embedding = self.vocabulary * self.width
        return self.layers * layer + self.width + embedding * (1 if self.tied else 2)

    def config(self) -> dict[str, Any]:
        """The config.json, as published."""
        mixture = {
            "architectures": ["Qwen3MoeForCausalLM"],
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "model_type": "qwen3_moe",
            "moe_intermediate_size": self.mlp,
            "norm_topk_prob": True,
            "num_experts": self.experts,
            "num_experts_per_tok": 8,
            "output_router_logits": False,
            "router_aux_loss_coef": 0.001,
        }
        return {
            "architectures": ["Qwen3ForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 151643,
            "eos_token_id": 151645,
            "head_dim": self.head_width,
            "hidden_act": "silu",
            "hidden_size": self.width,
            "initializer_range": 0.02,
            "intermediate_size": self.mlp,
            "max_position_embeddings": 40960,
            "max_window_layers": self.layers,
            "model_type": "qwen3",
            "num_attention_heads": self.heads,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.key_heads,
            "rms_norm_eps": 1e-06,
            "rope_scaling": None,
            "rope_theta": 1000000,
            "sliding_window": None,
            "tie_word_embeddings": self.tied,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.51.0",
            "use_cache": True,
            "use_sliding_window": False,
            "vocab_size": self.vocabulary,
        } | (mixture if self.experts else {})

    def write(self, folder: Path) -> Path:
        """Write the config.json into a folder and return its path."""
        path = folder / "config.json"
        path.write_text(json.dumps(self.config()), encoding="utf-8")
        return path


QWEN3_06B = Qwen3(width=1024, layers=28, heads=16, mlp=3072, tied=True)
QWEN3_8B = Qwen3(width=4096, layers=36, heads=32, mlp=12288, tied=False)
QWEN3_32B = Qwen3(width=5120, layers=64, heads=64, mlp=25600, tied=False)
QWEN3_30B_A3B = Qwen3(width=2048, layers=48, heads=32, key_heads=4, mlp=768, tied=False, experts=128)
