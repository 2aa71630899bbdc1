"""A model's weights as the files of a Hugging Face folder, planned alike on all ranks, each with its own rows.

What a parameter is called in the files, and which of its numbers a file's tensor has, is found by converting tensors
without numbers: transformers' conversions of most families are views. Where one is not (or an adapter is merged), the
whole tensor is gathered, a layer at a time, and rank 0 writes it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from learner.model.shared_files import Planned, Rows, SharedFile, give, own_rows, planned_files
from learner.model.tensor_files import WEIGHTS


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


def stored_shapes(model: PreTrainedModel, parameters: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    """Names and shapes of a model's weights in its files; tied ones once, nothing is gathered."""
    return {name: tensor.shape for name, tensor in _converted(model, parameters)[0].items()}


def weight_files(
    model: PreTrainedModel,
    tensors: Mapping[str, Tensor],
    whole: Iterator[tuple[str, Tensor]],
    beside: Mapping[str, Tensor],
    lead: bool,
) -> list[SharedFile]:
    """The files of a model's weights, with copies of what this rank writes.

    tensors: by their names in the model, tied ones once; beside: others, by their names in the files. whole: all
    weights as `named_weights` gives them, from which those that are no views are taken; a collective call if any are.
    """
    converted, blank = _converted(model, tensors)
    files = planned_files(
        WEIGHTS, {name: Planned.of(tensor) for name, tensor in {**converted, **beside}.items()}
    )
    held: dict[str, Rows | None] = {}
    gathered = set()
    for name, tensor in converted.items():
        origin = _origin(tensor, blank)
        if origin is None:
            gathered.add(name)
            continue
        if origin.parameter not in held:
            held[origin.parameter] = own_rows(tensors[origin.parameter], lead)
        give(files, name, _part(held[origin.parameter], origin.start, prod(tensor.shape)))
    for name, tensor in whole if gathered else ():
        if name in gathered:
            give(files, name, own_rows(tensor, lead))
    for name, tensor in beside.items():
        give(files, name, own_rows(tensor, lead))
    return files


def whole_files(
    shapes: Iterable[tuple[str, torch.Size]],
    whole: Iterator[tuple[str, Tensor]],
    beside: Mapping[str, Tensor],
    lead: bool,
) -> list[SharedFile]:
    """The files of weights that come whole, one after the other, in float32; others beside them.

    The lead writes them; all ranks take them, a collective call.
    """
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
