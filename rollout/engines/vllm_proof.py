"""Proof that each layer of vLLM's model computes with the tensor that was published.

Checksums prove that the right bytes arrive, but not what happens to them afterwards (renaming, fusing, packing, copies
that a reload skips). Logprobs detect only errors beyond the engine's rounding: noise of 1% in one tensor of a
pretrained model in bfloat16 changes them by a tenth of that rounding. A single layer has the rounding of one product
only: for fixed random vectors its result must equal that of the published matrix (Freivalds 1977).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from vllm.model_executor.layers.linear import LinearBase, QKVParallelLinear, UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from rollout.wire.weights import WeightMismatch

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

    It covers plain linear layers, the embedding, the head, biases and the weights of normalizations, if this process
    has all of one. Experts in one tensor, convolutions, and layers that tensor parallelism divides are verified by the
    probe's logprobs only.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        mapper = getattr(model, "hf_to_vllm_mapper", None)  # only families whose names differ have one
        self._rename = None if mapper is None else mapper.get_rename_mapper().map_name
        self._fused: dict[str, list[str]] = getattr(model, "packed_modules_mapping", None) or {}
        self._seen: dict[
            str, tuple[str, tuple[Tensor, ...]]
        ] = {}  # by vLLM's name: published name, possible results

    @torch.no_grad()
    def see(self, name: str, tensor: Tensor) -> None:
        """Note a published tensor on its way into the model."""
        renamed = self._rename(name) if self._rename else name
        if renamed is not None and tensor.ndim in (1, 2):
            self._seen[renamed] = name, _expected(tensor)

    @torch.no_grad()
    def check(self, version: int) -> int:
        """Raise WeightMismatch, naming the tensor, if a layer's result differs; returns how many were compared."""
        proved = 0
        for module_name, module in self._model.named_modules():
            for parameter, rows in _responses(module):
                published = self._published(module_name, module, parameter)
                # Families that publish queries, keys and values as one tensor interleave them by heads; vLLM does not.
                rearranged = isinstance(module, QKVParallelLinear) and len(published) == 1
                proved += self._compare(version, published, rows, rearranged)
        return proved

    def _published(
        self, module_name: str, module: nn.Module, parameter: str
    ) -> list[tuple[str, tuple[Tensor, ...]]]:
        """The published tensors of a module's parameter: one, several that it fuses, in order, or none."""
        parent, _, own = module_name.rpartition(".")
        whole = [f"{module_name}.{parameter}"]
        if whole[0] not in self._seen:
            whole = [f"{parent}.{name}.{parameter}".lstrip(".") for name in self._fused.get(own, [])]
        if not whole and isinstance(module, ParallelLMHead):
            whole = [f"{self._embedding()}.{parameter}"]  # a tied head
        return [self._seen[name] for name in whole] if all(name in self._seen for name in whole) else []

    def _embedding(self) -> str:
        return next(
            name for name, module in self._model.named_modules() if type(module) is VocabParallelEmbedding
        )

    def _compare(
        self, version: int, published: list[tuple[str, tuple[Tensor, ...]]], rows: _Rows, rearranged: bool
    ) -> int:
        proved = start = 0
        for name, candidates in published:
            stop = start + candidates[0].shape[-1]
            found = rows(start, stop)  # a vocabulary may be padded behind them
            if found.shape == candidates[0].shape:
                _require_one(version, name, candidates, found, rearranged)
                proved += 1
            start = stop
        return proved


def _expected(tensor: Tensor) -> tuple[Tensor, ...]:
    """Possible results of a layer with this tensor; some families store square matrices transposed."""
    if tensor.ndim == 1:
        return (tensor.clone(),)
    vectors_KD = _vectors(tensor.shape[1], tensor)
    ways = (tensor, tensor.T) if tensor.shape[0] == tensor.shape[1] else (tensor,)
    return tuple(linear(vectors_KD, matrix) for matrix in ways)


def _responses(module: nn.Module) -> Iterator[tuple[str, _Rows]]:
    """A module's vectors, and the products of its matrix with the fixed vectors, by parameter name."""
    if getattr(module, "tp_size", 1) > 1:
        return
    for name, tensor in module.named_parameters(recurse=False):
        if tensor.ndim == 1 and tensor.numel() and name in _VECTOR_PARAMETERS:
            yield name, partial(_part, tensor)
    layer: Any = module
    if isinstance(module, VocabParallelEmbedding):
        width = module.embedding_dim
    elif isinstance(module, LinearBase) and type(module.quant_method) is UnquantizedLinearMethod:
        width = layer.input_size  # whole here; not every kind of layer has the size of its part
    else:
        return
    vectors_KD = _vectors(width, layer.weight)
    if hasattr(module, "cpu_linear"):  # computes with a packed copy
        yield "weight", partial(_part, layer.quant_method.apply(layer, vectors_KD))
    elif layer.weight.ndim == 2 and layer.weight.shape[1] == width:
        yield "weight", lambda start, stop: linear(vectors_KD, layer.weight[start:stop])


def _part(whole: Tensor, start: int, stop: int) -> Tensor:
    return whole[..., start:stop]


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
