"""Models that compute in float64 throughout: results differ by their mathematics, not by rounding."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRMSNorm


def widened(model: PreTrainedModel) -> PreTrainedModel:
    """The model in float64, with the normalizations that transformers computes in float32 whatever the model's type.

    Experts are computed one by one: torch has no grouped products in float64.
    """
    model.double()
    model.config._experts_implementation = "eager"
    for module in model.modules():
        if isinstance(module, Qwen3RMSNorm | Qwen3MoeRMSNorm):
            module.forward = partial(_normalized, module)
    return model


def _normalized(norm: Qwen3RMSNorm | Qwen3MoeRMSNorm, x: Tensor) -> Tensor:
    """x / root mean square of x, times the weight."""
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.variance_epsilon)
    return norm.weight * (x * scale)
