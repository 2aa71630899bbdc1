"""A tiny vision model with random weights: LLaVA (Liu et al. 2023), vision tower, projection, language model."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AddedToken,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerBase,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from learner.model.tiny import tiny_config
from learner.model.tokenizer import CHAT_TEMPLATE

IMAGE = "<image>"
PATCH = 8  # pixels, wide and high, that are one token
_CONTENT = (
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{{ '<image>' if part.type == 'image' else part.text }}{% endfor %}{% endif %}"
)


def tiny_processor(
    tokenizer: PreTrainedTokenizerBase, pixels: int = 16, patch: int = PATCH
) -> LlavaProcessor:
    """The processor of a tiny vision model; the tokenizer gets the placeholder and a template for content parts."""
    tokenizer.add_tokens([AddedToken(IMAGE, special=True, normalized=False)], special_tokens=True)
    tokenizer.chat_template = CHAT_TEMPLATE.replace("{{ message.content }}", _CONTENT)
    square = {"height": pixels, "width": pixels}
    return LlavaProcessor(
        CLIPImageProcessorPil(
            size=square, do_center_crop=False, crop_size=square, image_mean=[0.5] * 3, image_std=[0.5] * 3
        ),
        tokenizer,
        patch_size=patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=tokenizer.chat_template,
    )


def build_tiny_vision(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    pixels: int = 16,
    patch: int = PATCH,
    layers: int = 2,
    width: int = 64,
    heads: int = 2,
    head_width: int = 32,
    mlp: int = 128,
    context: int = 512,
    tie: bool = True,
    seed: int = 0,
) -> None:
    """Write a random LLaVA and its processor into `folder`; transformers and vLLM load it by path.

    Pictures are resized to `pixels` wide and high, (pixels / patch)^2 tokens each. The vision tower has one used layer
    and one unused (LLaVA reads the last but one). Other parameters are as in `build_tiny`.
    """
    processor = tiny_processor(tokenizer, pixels, patch)
    scale = 0.4 / width**0.5
    vision = CLIPVisionConfig(
        hidden_size=heads * head_width,
        intermediate_size=mlp,
        num_hidden_layers=2,
        num_attention_heads=heads,
        image_size=pixels,
        patch_size=patch,
        projection_dim=width,
        initializer_range=scale,
    )
    text = tiny_config(tokenizer, layers, width, heads, head_width, mlp, context, tie)
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=(pixels // patch) ** 2,
        tie_word_embeddings=tie,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
    model.save_pretrained(folder)
    # LLaVA's own checkpoints and vLLM have the tower one level deeper than transformers writes it.
    file, tower = folder / "model.safetensors", "vision_tower."
    named = {name.replace(tower, f"{tower}vision_model."): x for name, x in load_file(file).items()}
    save_file(named, file, metadata={"format": "pt"})
    processor.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
