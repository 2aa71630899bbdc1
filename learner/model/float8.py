"""Products of linear layers in float8 (Micikevicius et al. 2022, FP8 Formats for Deep Learning), by torch's scaled_mm.

    y  = x8 W8'          e4m3 x e4m3       x8 = e4m3(x / s_x), s_x = max |x| / 448; W8 alike
    dx = dy8 W8          e5m2 x e4m3       dy8 = e5m2(dy / s_dy), s_dy = max |dy| / 57,344
    dW = dy8' x8         e5m2 x e4m3

Each tensor has one scale, found when it is used (dynamic, tensor-wise); products are summed in float32 and rounded to
bfloat16. Weights stay float32 as masters and come as bfloat16; what autograd keeps is the bfloat16 input.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import ScalingType, linear, scaled_mm

from learner.model.linear import plain_layers
from learner.model.routers import routers_in

FORWARD, BACKWARD = torch.float8_e4m3fn, torch.float8_e5m2
_MULTIPLE = 16  # of the sizes of matrices that a GPU multiplies
_LEAST_CAPABILITY = (8, 9)  # of GPUs with such products: Ada and Hopper
_AT_ONCE = 2**24  # numbers that are float32 meanwhile
_LEAST_SCALE = 1e-12  # of a tensor of zeros


def copied_bytes(tokens: int, rows: int, columns: int) -> int:
    """Most bytes of copies at once in a pass of so many tokens through a layer [V, D] and back: float8, float32 a part.

    Inputs, gradients and results, which are bfloat16, are not counted.
    """
    x, weight, gradient = tokens * columns, rows * columns, tokens * rows

    def made(numbers: int) -> int:
        """While a matrix becomes float8."""
        return numbers + 4 * min(numbers, _AT_ONCE)

    return max(
        made(x),
        x + made(weight),
        made(gradient),
        gradient + made(weight),
        gradient + 2 * weight,  # as it is and transposed
        gradient + made(x),
        2 * gradient + 2 * x,
    )


class Float8:
    """Linear layers of a model that compute in float8: those of sizes that GPUs multiply, except `leave` and routers.

    Inputs that are not bfloat16 are computed as before. Parameters stay the same objects under the same names.
    ValueError for a device without such products.
    """

    def __init__(self, model: nn.Module, leave: nn.Module | None, device: torch.device) -> None:
        if device.type == "cuda" and torch.cuda.get_device_capability(device) < _LEAST_CAPABILITY:
            name = torch.cuda.get_device_name(device)
            raise ValueError(f"learner.model.float8: {name} multiplies no float8 numbers; set it to false")
        self.off = False  # whether layers compute in bfloat16, at the moment
        left = {leave, *routers_in(model)}
        for _, parent, name, layer in plain_layers(model):
            if layer not in left and _fits(layer):
                parent.register_module(name, _Float8Linear(layer, self))

    @contextmanager
    def exact(self, wanted: bool) -> Iterator[None]:
        """Compute in bfloat16 meanwhile, if wanted."""
        self.off = wanted
        try:
            yield
        finally:
            self.off = False


def _fits(layer: nn.Linear) -> bool:
    return layer.in_features % _MULTIPLE == 0 and layer.out_features % _MULTIPLE == 0


class _Float8Linear(nn.Linear):
    """A linear layer whose products are float8."""

    def __init__(self, layer: nn.Linear, switch: Float8) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        self.weight, self.bias = layer.weight, layer.bias
        self._switch = switch

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., V], the same type as nn.Linear's."""
        if self._switch.off or x.dtype != torch.bfloat16 or self.weight.dtype != x.dtype:
            return linear(x, self.weight, self.bias)
        out: Tensor = _Linear.apply(x, self.weight)
        return out if self.bias is None else out + self.bias


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_VD: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight_VD)
        y_TV = _product(_Scaled(x.flatten(0, -2), FORWARD), _Scaled(weight_VD, FORWARD))
        return y_TV.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight_VD = ctx.saved_tensors
        # Tokens are padded with rows of zeros, up to what a GPU sums over.
        gradient, x_grad, weight_grad_VD = _Scaled(grad.flatten(0, -2), BACKWARD, _MULTIPLE), None, None
        if ctx.needs_input_grad[0]:
            x_grad_TD = _product(gradient, _Scaled(weight_VD, FORWARD).transposed())
            x_grad = x_grad_TD[: x[..., 0].numel()].view(x.shape)
        if ctx.needs_input_grad[1]:
            x8 = _Scaled(x.flatten(0, -2), FORWARD, _MULTIPLE)
            weight_grad_VD = _product(gradient.transposed(), x8.transposed())
        return x_grad, weight_grad_VD


class _Scaled:
    """A matrix as float8 numbers and what to multiply them by. multiple: of its rows, padded with zeros."""

    def __init__(self, matrix: Tensor, dtype: torch.dtype, multiple: int = 1) -> None:
        least, most = matrix.aminmax()
        largest = torch.maximum(most, -least).float()
        # Numbers that are not finite stay that: a step with such a gradient is refused.
        self.scale = (largest / torch.finfo(dtype).max).clamp(min=_LEAST_SCALE)
        own, columns = matrix.shape
        self.numbers = torch.empty(own + -own % multiple, columns, dtype=dtype, device=matrix.device)
        self.numbers[own:].zero_()
        rows = max(_AT_ONCE // columns, 1)
        for wide, stored in zip(matrix.split(rows), self.numbers[:own].split(rows), strict=True):
            stored.copy_(wide.float().div_(self.scale))

    def transposed(self) -> _Scaled:
        """The transposed matrix, which shares the scale."""
        found = object.__new__(_Scaled)
        found.scale, found.numbers = self.scale, self.numbers.t().contiguous()
        return found


def _product(left: _Scaled, right: _Scaled) -> Tensor:
    """left @ right.T in bfloat16: [M, K], [N, K] -> [M, N]."""
    one = ScalingType.TensorWise
    return scaled_mm(left.numbers, right.numbers.t(), left.scale, one, right.scale, one)
