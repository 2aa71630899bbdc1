"""A model's weights by their names in a Hugging Face folder: to be sent, and as its files.

Files are planned alike on all ranks, each with its own rows. What a parameter is called in them, and which of its
numbers a file's tensor has, is found by converting tensors without numbers: transformers' conversions of most families
are views. Where one is not (or an adapter is merged), the whole tensor is gathered, a layer at a time, and rank 0
writes it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, groupby
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel
from transformers.core_model_loading import dot_natural_key, revert_weight_conversion

from learner.model.loading import layer_of
from learner.model.logprobs import wide
from learner.model.lora import Adapter
from learner.model.nf4 import blank_matrices
from learner.model.shared_files import Planned, Rows, SharedFile, give, own_rows, planned_files
from learner.model.tensor_files import WEIGHTS
from learner.parallel.shards import gathered


@dataclass(frozen=True, slots=True)
class _Origin:
    """Where the numbers of a file's tensor come from: the parameter, and the first one's place in it."""

    parameter: str
    start: int


class _AsViews(TorchDispatchMode):
    """Copies of tensors without numbers are left out, so that what is cut out of a tensor stays a view of it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.clone.default:
            return args[0]
        return func(*args, **(kwargs or {}))


def named_weights(
    model: PreTrainedModel, adapter: Adapter | None, dtype: torch.dtype | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Every weight by its name in the files, detached; a tied head is not repeated.

    They come layer by layer, in the order of names. On several ranks each gathers one layer at a time, and all must
    take all of them. dtype: cast to it before they are gathered. With an adapter these are the merged weights.
    """
    parameters = dict(model.named_parameters())
    for _, names in groupby(sorted(parameters, key=dot_natural_key), key=layer_of):
        own = ((name, parameters[name].detach()) for name in names)
        layer = _whole_layer(own, adapter, dtype)
        found = revert_weight_conversion(model, layer)
        layer.clear()
        for name in list(found):
            yield name, found.pop(name)  # whole tensors are let go of one by one


def _whole_layer(
    own: Iterable[tuple[str, Tensor]], adapter: Adapter | None, dtype: torch.dtype | None
) -> dict[str, Tensor]:
    if adapter is None:
        return {name: gathered(tensor.to(dtype or tensor.dtype)) for name, tensor in own}
    merged = adapter.merged((name, gathered(tensor)) for name, tensor in own)
    return {name: tensor.to(dtype or wide(tensor)) for name, tensor in merged}


def weight_shapes(model: PreTrainedModel, adapter: Adapter | None) -> list[tuple[str, torch.Size]]:
    """The names and shapes of `named_weights`; nothing is gathered."""
    parameters = blank_matrices(model)
    if adapter is not None:
        of_base = {adapter.base_name(name): parameter for name, parameter in parameters.items()}
        parameters = {name: parameter for name, parameter in of_base.items() if name is not None}
    return [(name, tensor.shape) for name, tensor in _converted(model, parameters)[0].items()]


def weight_files(
    model: PreTrainedModel, adapter: Adapter | None, beside: Mapping[str, Tensor], lead: bool
) -> list[SharedFile]:
    """The files of a model's weights, with copies of what this rank writes. A collective call.

    With an adapter these are the merged weights, in float32, of which the lead writes all. beside: others, by their
    names in the files.
    """
    whole = named_weights(model, adapter)
    if adapter is not None:
        return _whole_files(weight_shapes(model, adapter), whole, beside, lead)
    state = model.state_dict()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in state}
    return _own_files(model, dict(model.named_parameters()) | buffers, whole, beside, lead)


def _own_files(
    model: PreTrainedModel,
    tensors: Mapping[str, Tensor],
    whole: Iterator[tuple[str, Tensor]],
    beside: Mapping[str, Tensor],
    lead: bool,
) -> list[SharedFile]:
    """tensors: by their names in the model, tied ones once. Those that are no views are taken from `whole`."""
    converted, blank = _converted(model, tensors)
    files = planned_files(
        WEIGHTS, {name: Planned.of(tensor) for name, tensor in {**converted, **beside}.items()}
    )
    held: dict[str, Rows | None] = {}
    apart = set()
    for name, tensor in converted.items():
        origin = _origin(tensor, blank)
        if origin is None:
            apart.add(name)
            continue
        if origin.parameter not in held:
            held[origin.parameter] = own_rows(tensors[origin.parameter], lead)
        give(files, name, _part(held[origin.parameter], origin.start, prod(tensor.shape)))
    for name, tensor in whole if apart else ():
        if name in apart:
            give(files, name, own_rows(tensor, lead))
    for name, tensor in beside.items():
        give(files, name, own_rows(tensor, lead))
    return files


def _whole_files(
    shapes: Iterable[tuple[str, torch.Size]],
    whole: Iterator[tuple[str, Tensor]],
    beside: Mapping[str, Tensor],
    lead: bool,
) -> list[SharedFile]:
    """Of weights that come whole, one after the other, in float32; all ranks take them."""
    planned = {name: Planned(tuple(shape), torch.float32) for name, shape in shapes}
    files = planned_files(WEIGHTS, planned | {name: Planned.of(tensor) for name, tensor in beside.items()})
    for name, tensor in chain(whole, beside.items()):
        give(files, name, own_rows(tensor, lead))
    return files


def _converted(
    model: PreTrainedModel, parameters: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[int, str]]:
    """The files' tensors, without numbers, and the parameter of each storage."""
    blank = {
        name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        for name, tensor in parameters.items()
    }
    with _AsViews(), torch.no_grad():
        found = revert_weight_conversion(model, dict(blank))
    return found, {tensor.untyped_storage()._cdata: name for name, tensor in blank.items()}


def _origin(tensor: Tensor, blank: Mapping[int, str]) -> _Origin | None:
    parameter = blank.get(tensor.untyped_storage()._cdata)
    if parameter is None or not tensor.is_contiguous():
        return None
    return _Origin(parameter, int(tensor.storage_offset()))


def _part(held: Rows | None, start: int, count: int) -> Rows | None:
    """Of `count` numbers of a parameter from `start` on those that this rank holds, counted from `start`."""
    if held is None:
        return None
    begin, end = max(start, held.start), min(start + count, held.start + len(held.numbers))
    return Rows(begin - start, held.numbers[begin - held.start : end - held.start]) if begin < end else None
