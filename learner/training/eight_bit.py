"""Moments of AdamW in eight bits a number, after Dettmers et al. 2022 (8-bit Optimizers via Block-wise Quantization).

    codes     uint8, of the parameter's shape     the dynamic type: signed for first moments, unsigned for second ones
    scales    float32 [rows, blocks of a row]     the largest of each block

    8 + 32 / 256 bits a number, where the paper and bitsandbytes have 2,048 and 256 numbers with one scale

Blocks are equal parts of a row, an entry of the first dimension: the longest of at most 256 numbers. So no block
crosses the border between two ranks, and moments are the same however many ranks the rows are sharded over. Neither do
tokens of an embedding share scales: it is in eight bits as other matrices are, where the paper keeps it in float32.

As in bitsandbytes, tensors of fewer than 4,096 numbers stay in float32. So do those whose rows have no equal parts of 8
numbers or more, vectors among them.

Unlike there, a second moment above zero never gets the code of zero: its root divides, and the update of such a number
would be that of its first moment divided by eps. It gets the least code, which makes its update smaller instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from learner.model.blockwise import Edges, dynamic_type, nearest

BLOCK = 256  # most numbers with one scale
_LEAST_BLOCK = 8  # numbers
_LEAST = 4096  # numbers of a tensor
_SCALE = 4  # bytes
AT_ONCE_CPU, AT_ONCE_GPU = 2**20, 2**24  # numbers that are updated at a time: of a CPU, what its cache holds
WORKING = 5  # float32 and int32 numbers for each of them: both moments, and three while one is quantized


class _Table(NamedTuple):
    values: Tensor
    edges: Edges


@cache
def _table(signed: bool, device: torch.device) -> _Table:
    values = dynamic_type(signed)
    return _Table(values.to(device), Edges.of(values, device))


def block_of(shape: Sequence[int]) -> int:
    """Numbers of a block of a parameter's moments; 0 where they stay in float32."""
    if prod(shape) < _LEAST:
        return 0
    row = prod(shape[1:])
    longest = max(size for size in range(1, BLOCK + 1) if row % size == 0)
    return longest if longest >= _LEAST_BLOCK else 0


def number_bytes(block: int = BLOCK) -> float:
    """Bytes of a number of a moment whose blocks are this long; of float32 for 0."""
    return 1 + _SCALE / block if block else 4.0


def quantize(moments_BC: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """Blocks of moments, float32, as codes uint8 [B, C] and scales float32 [B]."""
    scales_B = moments_BC.abs().amax(1)
    codes_BC = nearest(moments_BC, scales_B, _table(signed, moments_BC.device).edges)
    if not signed:
        codes_BC = torch.maximum(codes_BC, (moments_BC > 0).to(torch.uint8))
    return codes_BC, scales_B


def dequantize(codes_BC: Tensor, scales_B: Tensor, signed: bool) -> Tensor:
    """The moments that `quantize` has stored, float32 [B, C]."""
    values = _table(signed, codes_BC.device).values
    return values.index_select(0, codes_BC.flatten().int()).view_as(codes_BC).mul_(scales_B[:, None])
