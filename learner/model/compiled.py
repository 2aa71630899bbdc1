"""Layers compiled by torch (Ansel et al. 2024, PyTorch 2): what lies between matrix products becomes few kernels.

    before attention    normalization, products of queries, keys and values, their rotation
    attention           as it is: its blocks are those of the row
    behind it           product of the output, residual stream, normalization, perceptron

Layers of one kind share what was compiled: of the first row for its length, of the second one for any. Casts,
gathering, recomputation and what lies outside of layers (embedding, head, logprobs) are not compiled.
"""

from __future__ import annotations

import os
import shutil
from importlib.util import find_spec

import torch
from torch import nn

from learner.parallel.layers import layers_in

BACKEND = "inductor"
# Of one function: kinds of layers times uses (with gradients, without, a probe in float32). Beyond it torch compiles
# no more.
_COMPILATIONS = 64


def compile_layers(model: nn.Module, device: torch.device) -> None:
    """Replace the `forward` of every layer by a compiled one, before others wrap it.

    ValueError, one line, where nothing can be compiled, and for a model without layers.
    """
    _require_compiler(device)
    layers = layers_in(model)
    if not layers:
        raise ValueError("has no layers that can be compiled; set learner.model.compile=false")
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, _COMPILATIONS)
    for layer in layers:
        layer.forward = torch.compile(layer.forward, backend=BACKEND)


def _require_compiler(device: torch.device) -> None:
    """ValueError, one line, if what generated code is built with is missing here."""
    name = os.environ.get("CXX", "g++")
    if BACKEND == "inductor" and shutil.which(name) is None:
        raise ValueError(
            f"cannot be compiled: this machine has no C++ compiler {name!r}; install one (or name it in CXX), or set "
            "learner.model.compile=false"
        )
    if device.type == "cuda" and find_spec("triton") is None:
        raise ValueError(
            "cannot be compiled: kernels for GPUs need the package triton, which comes with torch for CUDA; install "
            "it, or set learner.model.compile=false"
        )
