"""Layers whose activations are computed again in the backward pass instead of being kept (Chen et al. 2016)."""

from __future__ import annotations

from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer


def recompute_layers(model: nn.Module) -> None:
    """Recompute every layer in the backward pass. ValueError for a model without layers.

    transformers' own switch works in training mode alone, which also turns on dropout and router noise.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(
            "has no layers that can be recomputed; set learner.model.gradient_checkpointing=false"
        )
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
