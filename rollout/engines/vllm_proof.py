"""Proof that each layer of vLLM's model computes with the tensor that was published.

Checksums prove that the right bytes arrive, but not what happens to them afterwards (renaming, fusing, packing, copies
that a reload skips). Logprobs detect only errors beyond the engine's rounding: noise of 1% in one tensor of a
pretrained model in bfloat16 changes them by a tenth of that rounding. A single layer has the rounding of one product
only: for fixed random vectors its result must equal that of the published matrix (Freivalds 1977).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from vllm.model_executor.layers.linear import (
    LinearBase,
    QKVParallelLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from rollout.wire.weights import WeightMismatch

logger = logging.getLogger(__name__)

_VECTORS = 4
# Allowed mean difference of two products, relative to their mean magnitude. Both are summed in float32 and rounded
# once; a different order of summation rounds a few values differently: measured at 0.0004 of bfloat16's resolution, and
# at 5e-7 in float32. _UNITS is in units of the dtype's resolution.
_UNITS, _LEAST = 0.02, 1e-5
_Rows = Callable[[int, int], Tensor]  # results of a layer's rows from the first to before the second
_VECTOR_PARAMETERS = (
    "weight",
    "bias",
)  # of normalizations and layers; other vectors may be transformed on loading


class LayerProof:
    """Compares results of the published tensors with results of the model's layers.

    Of a layer that tensor parallelism divides, every process compares its share. The proof covers plain linear layers,
    the embedding, the head, biases and the weights of normalizations. Experts in one tensor, convolutions, and divided
    layers whose loader computes what it copies are verified by the probe's logprobs only. So is a family whose tensors
    are published under names that fit no layer, of which a note is logged, once in a process.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        mapper = getattr(model, "hf_to_vllm_mapper", None)  # only families whose names differ have one
        self._rename = None if mapper is None else mapper.get_rename_mapper().map_name
        self._fused: dict[str, list[str]] = getattr(model, "packed_modules_mapping", None) or {}
        self._embedding = next(
            (name for name, module in model.named_modules() if type(module) is VocabParallelEmbedding), ""
        )
        # vLLM's names that may be a parameter's: of the rest nothing is computed.
        self._wanted = {
            name
            for module_name, module in model.named_modules()
            for parameter in _compared(module)
            for names in self._sources(module_name, module, parameter)
            for name in names
        }
        self._seen = False  # whether any tensor was published through `see`; vLLM's own transfers do not
        self._whole: dict[str, tuple[str, Tensor]] = {}  # by vLLM's name: published name and tensor
        self._renamed: dict[str, str] = {}  # of these, from the published name
        # By vLLM's name: results of what its loader copied, by the place in the parameter.
        self._shares: dict[str, dict[int, Tensor]] = {}

    def see(self, name: str, tensor: Tensor) -> None:
        """Note a published tensor, whole, on its way into the model."""
        self._seen = True
        renamed = self._rename(name) if self._rename else name
        if renamed in self._wanted and tensor.ndim in (1, 2):
            self._whole[renamed] = name, tensor
            self._renamed[name] = renamed

    @torch.no_grad()
    def copied(self, name: str, part: Tensor) -> None:
        """Note that the share of a published tensor was copied to a part of a parameter."""
        if name in self._renamed and part.ndim in (1, 2) and part.numel():
            shares = self._shares.setdefault(self._renamed[name], {})
            shares[int(part.storage_offset())] = _result(part)

    @torch.no_grad()
    def check(self, version: int) -> int:
        """Raise WeightMismatch, naming the tensor, if a layer's result differs; returns how many were compared."""
        proved, unproved = 0, list[str]()
        for module_name, module in self._model.named_modules():
            for parameter, rows in _responses(module):
                names = self._published(module_name, module, parameter)
                # Families that publish queries, keys and values as one tensor interleave them by heads; vLLM does not.
                rearranged = isinstance(module, QKVParallelLinear) and len(names) == 1
                divided = getattr(module, "tp_size", 1) > 1
                compared = self._compare(version, names, rows, divided, rearranged)
                proved += compared
                unproved += [] if compared else [f"{module_name}.{parameter}"]
        if unproved and self._seen:
            _note(len(unproved), unproved[0])
        return proved

    def _sources(self, module_name: str, module: nn.Module, parameter: str) -> list[list[str]]:
        """Names under which a module's parameter may be published: one, several that it fuses, in order."""
        parent, _, own = module_name.rpartition(".")
        fused = [f"{parent}.{name}.{parameter}".lstrip(".") for name in self._fused.get(own, [])]
        sources = [[f"{module_name}.{parameter}"], fused]
        if isinstance(module, ParallelLMHead):
            sources.append([f"{self._embedding}.{parameter}"])  # a tied head
        return sources

    def _published(self, module_name: str, module: nn.Module, parameter: str) -> list[str]:
        """The names under which it was published; none if it was not."""
        for names in self._sources(module_name, module, parameter):
            if names and all(name in self._whole for name in names):
                return names
        return []

    def _compare(self, version: int, names: list[str], rows: _Rows, divided: bool, rearranged: bool) -> int:
        proved = start = 0
        for renamed in names:
            name, tensor = self._whole[renamed]
            share = self._share(renamed)
            if share is not None and not divided and share.shape[-1] != tensor.shape[0]:
                share = None  # a part of what this layer has
            candidates = _expected(tensor) if share is None else (share,)
            stop = start + candidates[0].shape[-1]
            found = rows(start, stop)  # a vocabulary may be padded behind them
            if found.shape == candidates[0].shape:
                _require_one(version, name, candidates, found, rearranged and share is None)
                proved += 1
            start = stop
        return proved

    def _share(self, renamed: str) -> Tensor | None:
        """The result of what was copied of a tensor; None if its loader computes what it copies."""
        copied = self._shares.get(renamed)
        return torch.cat([copied[place] for place in sorted(copied)], -1) if copied else None


@cache  # once in a process: every sync finds the same
def _note(count: int, first: str) -> None:
    logger.warning(
        "%d parameters of the model's layers, the first %s, fit no published tensor: they are proved by the probe's "
        "logprobs alone",
        count,
        first,
    )


def _result(tensor: Tensor) -> Tensor:
    """The result of a layer's rows with this tensor."""
    return tensor.clone() if tensor.ndim == 1 else linear(_vectors(tensor.shape[1], tensor), tensor)


def _expected(tensor: Tensor) -> tuple[Tensor, ...]:
    """Possible results of a layer with this tensor; some families store square matrices transposed."""
    square = tensor.ndim == 2 and tensor.shape[0] == tensor.shape[1]
    return (_result(tensor), _result(tensor.T)) if square else (_result(tensor),)


def _compared(module: nn.Module) -> list[str]:
    """Names of a module's parameters that are compared: vectors, and the matrix of a plain layer."""
    vectors = [
        name
        for name, tensor in module.named_parameters(recurse=False)
        if tensor.ndim == 1 and tensor.numel() and name in _VECTOR_PARAMETERS
    ]
    return [*vectors, *(["weight"] if _width(module) else [])]


def _width(module: nn.Module) -> int:
    """Columns of the matrix that this process has of a plain layer; 0 for other modules."""
    layer: Any = module
    if isinstance(module, VocabParallelEmbedding):
        return int(module.embedding_dim)
    if not isinstance(module, LinearBase) or type(module.quant_method) is not UnquantizedLinearMethod:
        return 0
    return int(layer.input_size_per_partition if isinstance(module, RowParallelLinear) else layer.input_size)


def _responses(module: nn.Module) -> Iterator[tuple[str, _Rows]]:
    """A module's vectors, and the products of its matrix with the fixed vectors, by parameter name."""
    layer: Any = module
    width = _width(module)
    for name in _compared(module):
        tensor = getattr(module, name)
        if name != "weight" or not width:
            yield name, partial(_part, tensor)
        elif hasattr(module, "cpu_linear"):  # computes with a packed copy
            yield name, partial(_part, layer.quant_method.apply(layer, _vectors(width, tensor)))
        elif tensor.ndim == 2 and tensor.shape[1] == width:
            yield name, partial(_product, tensor)


def _part(whole: Tensor, start: int, stop: int) -> Tensor:
    return whole[..., start:stop]


def _product(matrix: Tensor, start: int, stop: int) -> Tensor:
    return _result(matrix[start:stop])


def _vectors(width: int, like: Tensor) -> Tensor:
    """[K, D] of normal numbers, the same for every layer of this width."""
    generator = torch.Generator().manual_seed(width)
    return torch.randn(_VECTORS, width, generator=generator).to(like.device, like.dtype)


def _require_one(
    version: int, name: str, candidates: tuple[Tensor, ...], found: Tensor, rearranged: bool
) -> None:
    copied = found.ndim == 1  # a vector is stored unchanged: there is no product to round
    allowed = 0.0 if copied else max(_UNITS * torch.finfo(found.dtype).eps, _LEAST)
    apart = min(_apart(expected.to(found.dtype), found, rearranged) for expected in candidates)
    if not apart <= allowed:
        raise WeightMismatch(
            f"version {version}: a layer computes with another {name} than was received: its "
            f"{'values' if copied else 'products'} differ by {apart:.2g} of their mean size (allowed {allowed:.2g})"
        )


def _apart(expected: Tensor, found: Tensor, rearranged: bool) -> float:
    """Mean difference of two results, relative to their mean size. rearranged: compare the sorted values."""
    ours, theirs = expected.float(), found.float()
    if rearranged:
        ours, theirs = ours.sort(-1).values, theirs.sort(-1).values
    return float((theirs - ours).abs().mean() / ours.abs().mean().clamp(min=torch.finfo(torch.float32).tiny))
