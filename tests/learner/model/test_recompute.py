"""Recomputed layers give the same bits; selectively, no product is computed again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig

from learner.data.batch import longest_row
from learner.model.footprint import saved_by
from learner.model.policy import Policy
from learner.model.recompute import KEPT
from learner.settings import ModelSettings

TOKENS = 96


class _Computed(TorchDispatchMode):
    """Counts products and attention, and the bytes of their results."""

    def __init__(self) -> None:
        super().__init__()
        self.count = self.nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in KEPT:
            self.count += 1
            results = found if isinstance(found, tuple) else (found,)
            self.nbytes += sum(each.nbytes for each in results if isinstance(each, Tensor))
        return found


def _backward(folder: Path, model: dict[str, Any], checkpointing: bool | str) -> tuple[list[Tensor], int]:
    """Gradients of a row, and how many products and attentions its backward pass computed."""
    policy = Policy(ModelSettings(path=str(folder), gradient_checkpointing=checkpointing, **model))
    loss = policy.score(longest_row(TOKENS + 1, TOKENS), 1.0)[0].sum()
    with (computed := _Computed()):
        loss.backward()
    return [p.grad for p in policy.parameters() if p.grad is not None], computed.count


@pytest.mark.parametrize("path", ["torch", "onednn"])
@pytest.mark.parametrize(
    "model",
    [{}, {"dtype": "bfloat16"}, {"dtype": "bfloat16", "lora": {"rank": 2}}],
    ids=["float32", "bfloat16", "lora"],
)
def test_gradients_are_the_same_and_products_are_not_computed_again(
    tiny: Path, model: dict[str, Any], path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MANTA_LINEAR", path)
    (kept, least), (whole, most), (selected, count) = (
        _backward(tiny, model, how) for how in (False, True, "selective")
    )
    assert len(kept) == len(whole) == len(selected) > 0
    for one, other, third in zip(kept, whole, selected, strict=True):
        assert torch.equal(one, other) and torch.equal(one, third)
    assert count == least < most


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_kept_is_told_without_weights(tiny: Path, dtype: str) -> None:
    config = AutoConfig.from_pretrained(tiny)
    heads, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    # Queries, keys, values, attention and what it is projected to; gate, up and down. A float32 for each head.
    numbers = (
        heads + 2 * keys + heads + config.hidden_size + 2 * config.intermediate_size + config.hidden_size
    )
    told = saved_by(config, dtype)
    assert told is not None
    size = {"float32": 4, "bfloat16": 2}[dtype]
    assert told.kept_per_token == size * numbers + 4 * config.num_attention_heads
    policy = Policy(ModelSettings(path=str(tiny), dtype=dtype))
    with (computed := _Computed()):
        policy.hidden(longest_row(TOKENS + 1, TOKENS))
    layers = config.num_hidden_layers
    assert computed.nbytes == pytest.approx(layers * TOKENS * told.kept_per_token, rel=0.02)
    half = told.row(TOKENS, layers, "selective")
    assert told.row(TOKENS, layers, True) < half < told.row(TOKENS, layers, False)
