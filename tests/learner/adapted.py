"""Adapters that have learned something, and what a model says without any of ours."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM


@torch.no_grad()
def learn(parameters: Iterable[Tensor]) -> None:
    """Move them, always by the same: B is no longer zeros."""
    generator = torch.Generator().manual_seed(5)
    for parameter in parameters:
        parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)


def plain(folder: Path) -> Any:
    """transformers' own model in float32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


def logprobs(model: torch.nn.Module, ids: Sequence[int]) -> np.ndarray:
    """Of all tokens but the first, by the model alone: no packing, no oneDNN."""
    ids_1T = torch.tensor([ids])
    with torch.no_grad():
        logprobs_TV = model.eval()(ids_1T).logits[0].float().log_softmax(-1)
    return logprobs_TV[:-1].gather(1, ids_1T[0, 1:, None])[:, 0].numpy()
