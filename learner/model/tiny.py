"""A tiny text model with random weights: Qwen3 of a few layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, Qwen3Config, Qwen3ForCausalLM


def build_tiny(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    layers: int = 4,
    width: int = 128,
    heads: int = 4,
    head_width: int = 32,
    mlp: int = 384,
    context: int = 512,
    tie: bool = True,
    seed: int = 0,
) -> None:
    """Write a random Qwen3 and its tokenizer into `folder`: transformers and vLLM load it by path.

    width: of the residual stream; head_width: of each head (vLLM's attention on CPUs needs multiples of 32); mlp: of
    the hidden layer; heads: query heads, with half as many key heads if their number is even; context: in tokens; tie:
    one matrix for embedding and head. The vocabulary is exactly the tokenizer's, so that every id has a token.
    """
    config = tiny_config(tokenizer, layers, width, heads, head_width, mlp, context, tie)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def tiny_config(
    tokenizer: PreTrainedTokenizerBase,
    layers: int,
    width: int,
    heads: int,
    head_width: int,
    mlp: int,
    context: int,
    tie: bool,
) -> Any:
    """The configuration of a tiny model."""
    return Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2 if heads % 2 == 0 else heads,
        head_dim=head_width,
        max_position_embeddings=context,
        # The usual 0.02 suits widths of a thousand; narrow models learn much sooner from larger weights.
        initializer_range=0.4 / width**0.5,
        tie_word_embeddings=tie,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
