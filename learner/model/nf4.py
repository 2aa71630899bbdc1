"""NF4: the frozen base of an adapter in four bits a number, with double quantization (Dettmers et al. 2023, QLoRA).

    W_i = NF4[code_i] * c_(i // 64)                   a scale for every block of 64 numbers of the flattened matrix
    c_j = E[code'_j] * s_(j // 256) + mean(c)         scales in eight bits, 256 of them with one scale of their own

    4 + 8/64 + 32/(64 * 256) = 4.127 bits a number    (section 3), and four bytes a matrix for mean(c)

Section 3 says of E "8-bit floats". It is bitsandbytes' dynamic type here (Dettmers 2016, 8-Bit Approximations for
Parallelism in Deep Learning), so that the numbers are those of models that are quantized elsewhere.

A matrix is stored as one tensor of bytes, its parts one behind the other:

    mean(c), s: float32    |    code': a byte a block    |    code: 32 bytes a block, the first of two in the high bits

Bytes are sharded, moved and compared as any parameter, and no precision policy casts them. Products are computed with
the dequantized matrix, which is made for each of them and not kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from learner.model.blockwise import Edges, dynamic_type, nearest
from learner.model.linear import plain_layers
from learner.model.routers import routers_in

BLOCK = 64  # numbers with one scale
SCALES = 256  # scales with one scale
BITS = 4 + 8 / BLOCK + 32 / (BLOCK * SCALES)  # of a number
_FLOAT = 4  # bytes
# Numbers that are converted at once, whole blocks: on a CPU they stay in its cache, a GPU starts few kernels.
_AT_ONCE_CPU, _AT_ONCE_GPU = 2**20, 2**26
_CONVERTED = 6  # bytes of such a number meanwhile: half an index, and a float32

# Appendix E: the quantiles of a normal distribution that lie in [-1, 1], with an exact zero.
NF4 = torch.tensor(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ]
)


EIGHT_BITS = dynamic_type(signed=True)
_PAIRS = torch.cartesian_prod(NF4, NF4)  # [256, 2]: the two numbers of a byte


class _Tables(NamedTuple):
    """What codes stand for, and the middles between neighbours, on one device."""

    nf4_edges: Edges
    eight: Tensor
    eight_edges: Edges
    pairs: Tensor


@cache
def _tables(device: torch.device) -> _Tables:
    return _Tables(
        Edges.of(NF4, device), EIGHT_BITS.to(device), Edges.of(EIGHT_BITS, device), _PAIRS.to(device)
    )


class _Parts(NamedTuple):
    """Views of a stored matrix of B blocks: mean(c) [1], s [S], code' [B], code [32 B]."""

    mean: Tensor
    scales_S: Tensor
    scale_codes_B: Tensor
    codes: Tensor


def stored_bytes(numbers: int) -> int:
    """Bytes of a stored matrix of so many numbers."""
    blocks = -(-numbers // BLOCK)
    return _FLOAT * (1 + -(-blocks // SCALES)) + blocks + blocks * BLOCK // 2


def dequantizing_bytes(numbers: int, size: int) -> int:
    """Bytes that a GPU needs to dequantize a matrix, whose numbers then have `size` bytes; it is among them."""
    return size * numbers + _CONVERTED * min(numbers, _AT_ONCE_GPU)


def _at_once(device: torch.device) -> int:
    return _AT_ONCE_CPU if device.type == "cpu" else _AT_ONCE_GPU


def _parts(stored: Tensor, numbers: int) -> _Parts:
    blocks = -(-numbers // BLOCK)
    floats = _FLOAT * (1 + -(-blocks // SCALES))
    wide, scale_codes_B, codes = stored.split([floats, blocks, blocks * BLOCK // 2])
    floats_S = wide.view(torch.float32)
    return _Parts(floats_S[:1], floats_S[1:], scale_codes_B, codes)


@torch.no_grad()
def quantize(matrix: Tensor) -> Tensor:
    """Store a matrix of any shape: uint8 [`stored_bytes`], on its device. ValueError for numbers that are not finite.

    Every number gets the nearest code, of two as near the lower one.
    """
    flat, tables = matrix.detach().reshape(-1), _tables(matrix.device)
    stored = torch.empty(stored_bytes(len(flat)), dtype=torch.uint8, device=matrix.device)
    parts = _parts(stored, len(flat))
    largest_B = torch.empty(len(parts.scale_codes_B), dtype=torch.float32, device=matrix.device)
    step = _at_once(matrix.device)
    for begin in range(0, len(flat), step):
        numbers_BC = _blocks(flat[begin : begin + step].float(), BLOCK)
        own_B = numbers_BC.abs().amax(1)
        first, count = begin // BLOCK, len(own_B)
        largest_B[first : first + count] = own_B
        pairs = nearest(numbers_BC, own_B, tables.nf4_edges).view(-1, 2)
        codes = parts.codes[first * BLOCK // 2 : (first + count) * BLOCK // 2]
        codes.copy_(pairs[:, 0] * 16 + pairs[:, 1])
    mean = largest_B.double().mean().float()
    if not torch.isfinite(mean):
        raise ValueError("numbers that are not finite")
    parts.mean.copy_(mean)
    centred_SC = _blocks(largest_B - mean, SCALES)
    parts.scales_S.copy_(centred_SC.abs().amax(1))
    scale_codes = nearest(centred_SC, parts.scales_S, tables.eight_edges)
    parts.scale_codes_B.copy_(scale_codes.flatten()[: len(largest_B)])
    return stored


def _blocks(flat: Tensor, size: int) -> Tensor:
    """[n] -> [blocks, size], the last one filled up with zeros."""
    return pad(flat, (0, -len(flat) % size)).view(-1, size)


@torch.no_grad()
def dequantize(stored: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """The matrix of this shape that `quantize` stored, computed in float32 and rounded to `dtype`."""
    # In place and by gathers alone: none of it counts as arithmetic of the model (learner.training.probe).
    parts, tables = _parts(stored, shape.numel()), _tables(stored.device)
    blocks = len(parts.scale_codes_B)
    scales_SC = _blocks(tables.eight.index_select(0, parts.scale_codes_B.int()), SCALES)
    scales_B = scales_SC.mul_(parts.scales_S[:, None]).flatten()[:blocks].add_(parts.mean)
    numbers_BC = torch.empty(blocks, BLOCK, dtype=dtype, device=stored.device)
    bytes_BC = parts.codes.view(blocks, BLOCK // 2)
    step = _at_once(stored.device) // BLOCK
    for begin in range(0, blocks, step):
        pairs = tables.pairs.index_select(0, bytes_BC[begin : begin + step].flatten().int())
        own_B1 = scales_B[begin : begin + step, None]
        numbers_BC[begin : begin + step] = pairs.view(-1, BLOCK).mul_(own_B1)
    return numbers_BC.view(-1)[: shape.numel()].view(shape)


class Nf4Linear(nn.Linear):
    """A frozen linear layer whose matrix is stored in NF4; products have the type of what it is given.

    `weight` is the stored matrix. It is an nn.Linear, since that is what adapters are added to.
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        self.dtype = layer.weight.dtype  # that products have, too
        self.weight = nn.Parameter(quantize(layer.weight), requires_grad=False)
        self.bias = layer.bias
        self.requires_grad_(False)

    @property
    def shape(self) -> torch.Size:
        """Of the matrix: [V, D]."""
        return torch.Size((self.out_features, self.in_features))

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., V]; between forward and backward pass the stored matrix alone is kept."""
        out: Tensor = _Product.apply(x, self.weight, self.shape, self.bias)
        return out


class _Product(torch.autograd.Function):
    """x W' + b with a constant W, which both passes dequantize."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, stored: Tensor, shape: torch.Size, bias_V: Tensor | None) -> Tensor:
        ctx.save_for_backward(stored)
        ctx.shape = shape
        return linear(x, dequantize(stored, shape, x.dtype), bias_V)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, None]:
        (stored,) = ctx.saved_tensors
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        return grad @ dequantize(stored, ctx.shape, grad.dtype), None, None, None


def quantize_layers(model: nn.Module, leave: nn.Module | None) -> None:
    """Replace the linear layers that have numbers, except `leave` and routers, by ones in NF4.

    ValueError as in `quantize`.
    """
    left = {leave, *routers_in(model)}
    for path, parent, name, layer in plain_layers(model):
        if layer in left or layer.weight.is_meta:
            continue
        try:
            parent.register_module(name, Nf4Linear(layer))
        except ValueError as error:
            raise ValueError(f"{path}.{name}.weight has {error}; use other files") from error


def as_matrices(model: nn.Module, parameters: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Whole parameters of the model by their names, those of layers in NF4 as the matrices that they compute with."""
    for name, tensor in parameters:
        layer = _layer(model, name)
        yield name, tensor if layer is None else dequantize(tensor, layer.shape, layer.dtype)


def blank_matrices(model: nn.Module) -> dict[str, Tensor]:
    """All parameters of the model in the shapes of `as_matrices`, without numbers."""
    found = {}
    for name, parameter in model.named_parameters():
        layer = _layer(model, name)
        found[name] = torch.empty(parameter.shape if layer is None else layer.shape, device="meta")
    return found


def _layer(model: nn.Module, name: str) -> Nf4Linear | None:
    """The layer in NF4 whose stored matrix a parameter is."""
    path, _, last = name.rpartition(".")
    layer = model.get_submodule(path)
    return layer if isinstance(layer, Nf4Linear) and last == "weight" else None
