"""Float32 linear layers on CPUs through oneDNN, which uses AVX-512 where torch's default BLAS may not.

torch multiplies float32 matrices on a CPU with MKL, which keeps to AVX2 on processors of other makes than Intel's.
oneDNN, which x86 builds of torch hold too, is there more than twice as fast in a small model's shapes, and as exact. On
Intel's own it is the other way round: MKL is a sixth faster there, and compiles nothing.

The environment variable MANTA_LINEAR ("onednn" or "torch") forces one of the two on any processor.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

# oneDNN's own, and that of what torch puts between; each holds on to what the other lets go. Read at their first use.
_KERNEL_CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
_KERNELS = 64

PATH = "MANTA_LINEAR"  # environment variable that forces a path
_ONEDNN, _TORCH = "onednn", "torch"


def use_onednn(module: nn.Module, leave: nn.Module | None = None) -> None:
    """Replace every plain linear layer below `module` but `leave` by one that computes through oneDNN.

    Done where oneDNN is the faster path and torch has it; MANTA_LINEAR decides instead where it is set, and ValueError
    is raised where it cannot be obeyed. Parameters stay the same objects under the same names. What is not float32 on a
    CPU is computed as before.

    oneDNN compiles a kernel for every shape, half a megabyte each, and keeps a thousand of them for every thread:
    packed rows are of ever new lengths, and a learner would grow by a gigabyte. It can use those of one row again.
    """
    if not _onednn_wanted():
        return
    for cache in _KERNEL_CACHES:
        os.environ.setdefault(cache, str(_KERNELS))
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and child is not leave:
                parent.register_module(name, _OneDnnLinear(child))


def _onednn_wanted() -> bool:
    forced = os.environ.get(PATH, "")
    if forced not in ("", _ONEDNN, _TORCH):
        raise ValueError(
            f"{PATH}={forced!r} in the environment is neither {_ONEDNN!r} nor {_TORCH!r}; "
            "unset it to have the processor decide"
        )
    if forced == _ONEDNN and not _torch_has_onednn():
        raise ValueError(f"{PATH}={_ONEDNN!r}, but this build of torch has no oneDNN; unset it")
    return forced == _ONEDNN or (not forced and not _mkl_knows_this_processor() and _torch_has_onednn())


def _torch_has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and torch._C._dispatch_has_kernel("mkldnn::_linear_pointwise")


def _mkl_knows_this_processor() -> bool:
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:  # no Linux: nobody has measured
        return False


class _OneDnnLinear(nn.Module):
    """nn.Linear with another product."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., V], the same type as nn.Linear's."""
        if x.dtype != torch.float32 or x.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
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
        if ctx.needs_input_grad[1]:  # the wider matrix on the right is the faster order
            if grad_TV.shape[1] > x_TD.shape[1]:
                weight_grad_VD = _product(x_TD.T, grad_TV.T).T
            else:
                weight_grad_VD = _product(grad_TV.T, x_TD.T)
        return x_grad, weight_grad_VD, grad_TV.sum(0) if ctx.needs_input_grad[2] else None
