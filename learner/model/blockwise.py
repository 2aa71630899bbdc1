"""Block-wise quantization: every block of numbers has a scale, its largest, and every number a code into a table.

x_i = values[code_i] * scale_block            nearest of the table's values to x_i / scale (Dettmers et al. 2022,
                                              8-bit Optimizers via Block-wise Quantization, section 2)
"""

from __future__ import annotations

import torch
from torch import Tensor

_POWERS = 7  # of ten, that the dynamic type reaches over


def dynamic_type(signed: bool) -> Tensor:
    """The 256 values of bitsandbytes' dynamic type in order, in [-1, 1] or [0, 1]: float32 (Dettmers 2016).

    The leading zeros of a code are a power of ten, its other bits a fraction: the centre of one of equal parts from a
    tenth to the whole of the power. Without a sign its bit is one more of the fraction (Dettmers et al. 2022).
    """
    found = [torch.tensor([0.0, 1.0])]
    for power in range(_POWERS):
        parts = 2 ** (power if signed else power + 1)
        edges = torch.linspace(0.1, 1.0, parts + 1)
        centres = 10.0 ** (power - _POWERS + 1) * ((edges[:-1] + edges[1:]) / 2)
        found += [centres, -centres] if signed else [centres]
    return torch.cat(found).sort().values


def middles(values: Tensor) -> Tensor:
    """Where the nearest of the values changes, between each two neighbours."""
    return (values[:-1] + values[1:]) / 2


def nearest(numbers_BC: Tensor, largest_B: Tensor, edges: Tensor) -> Tensor:
    """Codes of numbers that are divided by their block's largest, of two as near the lower one: uint8 [B, C].

    edges: `middles` of the values.
    """
    # A reciprocal, as bitsandbytes computes it. Of a block of zeros it is infinite: its numbers stay zeros.
    inverse_B = largest_B.reciprocal()
    inverse_B = torch.where(torch.isfinite(inverse_B), inverse_B, 0.0)
    return torch.bucketize(numbers_BC * inverse_B[:, None], edges, out_int32=True).to(torch.uint8)
