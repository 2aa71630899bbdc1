"""Layers whose activations are computed again in the backward pass instead of being kept (Chen et al. 2016).

Selectively, what matrix products and attention gave is kept, and what lies between them is computed again:
normalizations, rotations, and activation functions take little time and hold half of the memory.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    noop_context_fn,
)

from learner.parallel.layers import layers_in

# Names of operators whose results are kept: products on any device and in any type, and attention's kernels.
# Not baddbmm: it adds an adapter's product to the weights of all experts, which are as large as the layer.
_PRODUCTS = (
    "mm",
    "addmm",
    "bmm",
    "linear",
    "_linear_pointwise",
    "_grouped_mm",
    "grouped_mm_fallback",
    "_scaled_mm_v2",
)
_ATTENTION = (
    "_scaled_dot_product_flash_attention_for_cpu",
    "_efficient_attention_forward",
    "_varlen_attn",
)
KEPT = frozenset((*_PRODUCTS, *_ATTENTION))


def recompute_layers(model: nn.Module, selectively: bool) -> None:
    """Recompute every layer in the backward pass, or all of it but products. ValueError for a model without layers.

    transformers' own switch works in training mode alone, which also turns on dropout and router noise.
    """
    layers = layers_in(model)
    if not layers:
        raise ValueError(
            "has no layers that can be recomputed; set learner.model.gradient_checkpointing=false"
        )
    contexts = partial(create_selective_checkpoint_contexts, _kept) if selectively else noop_context_fn
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, context_fn=contexts)


def _kept(context: Any, operator: Any, *given: Any, **named: Any) -> CheckpointPolicy:
    kept = operator.overloadpacket.__name__ in KEPT
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
