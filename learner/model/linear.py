"""Float32 linear layers on CPUs through oneDNN, which uses AVX-512 where torch's default BLAS may not.

torch multiplies float32 matrices on a CPU with MKL, which is limited to AVX2 on processors not made by Intel. There
oneDNN, part of torch's x86 builds, is more than twice as fast in a small model's shapes, and as exact. On Intel's
processors MKL is a sixth faster and compiles nothing.

oneDNN compiles a kernel for every new shape, a millisecond, and packed rows always have new lengths: layers whose
products take no longer than that stay torch's.

The environment variable MANTA_LINEAR ("onednn" or "torch") forces one of the two, for every layer and on any processor.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

# Caches of oneDNN and of torch's wrapper; each keeps entries that the other evicts. Read at their first use.
_KERNEL_CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
_KERNELS = 64

_LEAST_WEIGHTS = 2**16  # of a layer whose products are worth a kernel: a millisecond for some 700 tokens

PATH = "MANTA_LINEAR"  # environment variable that forces a path
_ONEDNN, _TORCH = "onednn", "torch"


def use_onednn(module: nn.Module, leave: nn.Module | None = None) -> None:
    """Replace plain linear layers below `module`, except `leave` and small ones, by ones that compute through oneDNN.

    Only if oneDNN is the faster path and torch has it; MANTA_LINEAR overrides this and the size, and ValueError is
    raised if it cannot be followed. Parameters stay the same objects under the same names. Inputs that are not float32
    on a CPU are computed as before.

    oneDNN compiles a kernel for every shape, half a megabyte each, and keeps a thousand of them for every thread.
    Packed rows always have new lengths, so a learner would grow by a gigabyte; the caches are bounded to the kernels of
    one row.
    """
    if not _onednn_wanted():
        return
    least = 0 if os.environ.get(PATH) else _LEAST_WEIGHTS
    for cache in _KERNEL_CACHES:
        os.environ.setdefault(cache, str(_KERNELS))
    for _, parent, name, layer in plain_layers(module):
        if layer is not leave and layer.weight.numel() >= least:
            parent.register_module(name, _OneDnnLinear(layer))


def plain_layers(module: nn.Module) -> list[tuple[str, nn.Module, str, nn.Linear]]:
    """The plain linear layers below `module`, each with its parent's path, its parent and its name."""
    return [
        (path, parent, name, child)
        for path, parent in module.named_modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear
    ]


def _onednn_wanted() -> bool:
    forced = os.environ.get(PATH, "")
    if forced not in ("", _ONEDNN, _TORCH):
        raise ValueError(
            f"environment variable {PATH}={forced!r} is neither {_ONEDNN!r} nor {_TORCH!r}; unset it to choose by "
            "processor"
        )
    if forced == _ONEDNN and not _torch_has_onednn():
        raise ValueError(
            f"environment variable {PATH}={_ONEDNN!r}, but this build of torch has no oneDNN; unset it"
        )
    return forced == _ONEDNN or (not forced and not _mkl_knows_this_processor() and _torch_has_onednn())


def _torch_has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and torch._C._dispatch_has_kernel("mkldnn::_linear_pointwise")


def _mkl_knows_this_processor() -> bool:
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:  # not Linux: not measured
        return False


class _OneDnnLinear(nn.Module):
    """nn.Linear computed by oneDNN."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., V], the same type as nn.Linear's."""
        if x.dtype != torch.float32 or x.device.type != "cpu":
            return linear(x, self.weight, self.bias)
        out: Tensor = _Linear.apply(x, self.weight, self.bias)
        return out


def _product(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """left @ right.T + bias in float32."""
    out: Tensor = torch.ops.mkldnn._linear_pointwise(left, right, bias, "none", [], "")
    return out


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_VD: Tensor, bias_V: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight_VD)
        return _product(x, weight_VD, bias_V)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight_VD = ctx.saved_tensors
        grad_TV, x_TD = grad.flatten(0, -2), x.flatten(0, -2)
        x_grad = _product(grad_TV, weight_VD.T).view(x.shape) if ctx.needs_input_grad[0] else None
        weight_grad_VD = None
        if ctx.needs_input_grad[1]:  # faster with the wider matrix on the right
            if grad_TV.shape[1] > x_TD.shape[1]:
                weight_grad_VD = _product(x_TD.T, grad_TV.T).T
            else:
                weight_grad_VD = _product(grad_TV.T, x_TD.T)
        return x_grad, weight_grad_VD, grad_TV.sum(0) if ctx.needs_input_grad[2] else None
