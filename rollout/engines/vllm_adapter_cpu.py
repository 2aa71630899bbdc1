"""The products of adapters on CPUs, as plain matrix products: one for each adapter of a batch.

vLLM's own implementation for CPUs copies an adapter's matrices once for each token: a prefill of 4,000 tokens moves a
hundred gigabytes for rank 16 of a model of 135M parameters, and the engine is silent for longer than a heartbeat. It
also computes tokens without an adapter with the last one, whose index -1 is.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor
from torch.nn.functional import linear
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU


def multiply_by_adapter() -> None:
    """Replace vLLM's products in this process; the data types stay vLLM's."""
    PunicaWrapperCPU._apply_shrink = _shrink
    PunicaWrapperCPU._apply_expand = _expand


def _shares(self: PunicaWrapperCPU, tokens: int, w_t_all: Tensor) -> Iterator[tuple[slice | Tensor, Tensor]]:
    """Yield the rows of each adapter's tokens and its matrix [outputs, inputs]; tokens without an adapter have none."""
    # w_t_all: [adapters, 1, outputs, inputs]
    indices = self.token_lora_indices[:tokens]
    if bool((indices == indices[0]).all()):
        first = int(indices[0])
        if 0 <= first < len(w_t_all):
            yield slice(None), w_t_all[first, 0]
        return
    for adapter in range(len(w_t_all)):
        rows = (indices == adapter).nonzero().flatten()
        if len(rows):
            yield rows, w_t_all[adapter, 0]


def _shrink(self: PunicaWrapperCPU, y: Tensor, x: Tensor, w_t_all: Tensor, scale: float) -> None:
    # x: [tokens, inputs]; y: float32 [tokens, rank], zeros
    flat = y.view(-1, y.shape[-1])
    for rows, weight in _shares(self, len(x), w_t_all):
        flat[rows, : len(weight)] = scale * linear(x[rows].to(y.dtype), weight.to(y.dtype))


def _expand(
    self: PunicaWrapperCPU,
    y: Tensor,
    x: Tensor,
    w_t_all: Tensor,
    y_offset: int,
    y_slice_size: int,
    add_inputs: bool = True,
) -> None:
    # x: [tokens, rank]; y: [tokens, all outputs]
    part = y[:, y_offset : y_offset + y_slice_size]
    for rows, weight in _shares(self, len(x), w_t_all):
        product = linear(x[rows].to(y.dtype), weight.to(y.dtype))
        part[rows] = part[rows] + product if add_inputs else product
