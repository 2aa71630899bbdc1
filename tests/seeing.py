"""Tiny models that see, one of each family, and pictures to show them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from envs.images import image_part
from learner.model.tiny_vision import build_tiny_vision
from learner.model.tokenizer import build_tokenizer

PLACEHOLDER = 60  # of the Qwen models; LLaVA's is its last token
CONTEXT = 128
_VISION = {"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "num_heads": 2, "depth": 2}
_QWEN: dict[str, Any] = {
    "qwen2_vl": (
        Qwen2VLConfig,
        Qwen2VLForConditionalGeneration,
        _VISION | {"embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2},
    ),
    "qwen2_5_vl": (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        _VISION
        | {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 32, "fullatt_block_indexes": [1]}
        | {"window_size": 16},
    ),
    "qwen3_vl": (
        Qwen3VLConfig,
        Qwen3VLForConditionalGeneration,
        _VISION
        | {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 32, "num_position_embeddings": 64}
        | {"deepstack_visual_indexes": [0]},
    ),
}
FAMILIES = ("llava", *_QWEN)


def build(family: str, folder: Path, head_width: int = 16) -> None:
    """Write a model of two layers and its image processor; LLaVA's with its whole processor and tokenizer."""
    if family == "llava":
        tokenizer = build_tokenizer(folder, ["which", "colour", "before", "red", "green", "blue", "yellow"])
        build_tiny_vision(folder, tokenizer, width=32, head_width=head_width, mlp=48, context=CONTEXT)
        return
    config_type, model_type, vision = _QWEN[family]
    text = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "max_position_embeddings": CONTEXT,
        "initializer_range": 0.3,
        "bos_token_id": None,
        "eos_token_id": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
    }
    config = config_type(
        text_config=text,
        vision_config=vision | {"initializer_range": 0.3},
        image_token_id=PLACEHOLDER,
        video_token_id=61,
        vision_start_token_id=62,
        vision_end_token_id=63,
    )
    torch.manual_seed(0)
    model_type(config).save_pretrained(folder)
    Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 64, "longest_edge": 1024}
    ).save_pretrained(folder)


def picture(seed: int, height: int = 16, width: int = 16) -> str:
    """A picture of noise, as a data URL."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return str(image_part(pixels)["image"])
