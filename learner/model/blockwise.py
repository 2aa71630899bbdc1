"""Block-wise quantization: every block of numbers has a scale, its largest, and every number a code into a table.

x_i = values[code_i] * scale_block            nearest of the table's values to x_i / scale (Dettmers et al. 2022,
                                              8-bit Optimizers via Block-wise Quantization, section 2)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_POWERS = 7  # of ten, that the dynamic type reaches over
_HALVES = 2**16  # values of half the bits of a float32


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


class Edges(NamedTuple):
    """Where the nearest of some values changes: `middles` between neighbours, float32, and infinity after the last.

    least: int32 [65,536], by the first half of a float32's bits (sign, exponent and seven of its fraction): the code of
    the least number that begins so. At most one middle lies among these numbers, so that comparing with it gives the
    code, without a search.
    """

    middles: Tensor
    least: Tensor

    @classmethod
    def of(cls, values: Tensor, device: torch.device) -> Edges:
        """Those of values in order. AssertionError where two middles are that close."""
        middles = (values[:-1] + values[1:]) / 2
        begun = torch.arange(-_HALVES // 2, _HALVES // 2, dtype=torch.int32) << 16
        ends_2H = torch.stack([begun, begun | 0xFFFF]).view(torch.float32)
        ends_2H = torch.where(ends_2H.isnan(), ends_2H[0], ends_2H)  # beside an infinity
        least, most = torch.bucketize(ends_2H, middles, out_int32=True).aminmax(dim=0)
        assert (most - least <= 1).all()
        return cls(torch.cat([middles, torch.tensor([torch.inf])]).to(device), least.to(device))


def nearest(numbers_BC: Tensor, largest_B: Tensor, edges: Edges) -> Tensor:
    """Codes of float32 numbers divided by their block's largest, of two as near the lower one: uint8 [B, C]."""
    # A reciprocal, as bitsandbytes computes it. Of a block of zeros it is infinite: its numbers stay zeros.
    inverse_B = largest_B.reciprocal()
    inverse_B = torch.where(torch.isfinite(inverse_B), inverse_B, 0.0)
    scaled_n = (numbers_BC * inverse_B[:, None]).view(-1)
    codes_n = edges.least.index_select(0, (scaled_n.view(torch.int32) >> 16).add_(_HALVES // 2))
    above_n = scaled_n > edges.middles.index_select(0, codes_n)
    return codes_n.to(torch.uint8).add_(above_n.view(torch.uint8)).view_as(numbers_BC)
