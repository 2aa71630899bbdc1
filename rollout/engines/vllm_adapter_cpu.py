"""The products of one adapter on CPUs, as plain matrix products.

vLLM's own implementation for CPUs copies the adapter's matrices once for each token: a prefill of 4,000 tokens moves a
hundred gigabytes for rank 16 of a model of 135M parameters, and the engine is silent for longer than a heartbeat. Our
engines hold one adapter, which every request uses.
"""

from __future__ import annotations

import torch
from torch.nn.functional import linear
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

_apply_shrink, _apply_expand = PunicaWrapperCPU._apply_shrink, PunicaWrapperCPU._apply_expand


def multiply_once() -> None:
    """Replace vLLM's products in this process, for engines with room for one adapter; the data types stay vLLM's."""
    PunicaWrapperCPU._apply_shrink = _shrink
    PunicaWrapperCPU._apply_expand = _expand


def _shrink(
    self: PunicaWrapperCPU, y: torch.Tensor, x: torch.Tensor, w_t_all: torch.Tensor, scale: float
) -> None:
    # x: [tokens, inputs]; w_t_all: [adapters, 1, rank, inputs]; y: float32 [tokens, rank]
    if w_t_all.shape[0] > 1:
        _apply_shrink(self, y, x, w_t_all, scale)
        return
    weight = w_t_all.reshape(w_t_all.shape[-2:])
    y.view(-1, y.shape[-1])[:, : weight.shape[0]] = scale * linear(x.to(y.dtype), weight.to(y.dtype))


def _expand(
    self: PunicaWrapperCPU,
    y: torch.Tensor,
    x: torch.Tensor,
    w_t_all: torch.Tensor,
    y_offset: int,
    y_slice_size: int,
    add_inputs: bool = True,
) -> None:
    # x: [tokens, rank]; w_t_all: [adapters, 1, outputs, rank]; y: [tokens, all outputs]
    if w_t_all.shape[0] > 1:
        _apply_expand(self, y, x, w_t_all, y_offset, y_slice_size, add_inputs)
        return
    weight = w_t_all.reshape(w_t_all.shape[-2:])
    part = y[:, y_offset : y_offset + y_slice_size]
    product = linear(x.to(y.dtype), weight.to(y.dtype))
    part.copy_(part + product if add_inputs else product)
