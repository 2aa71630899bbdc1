"""The layers of a transformers model: what is gathered, cast, recomputed or compiled at a time."""

from __future__ import annotations

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer


def layers_in(model: nn.Module) -> list[nn.Module]:
    """Its layers in order, the model itself where it is one; none of a family whose layers have another base."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
