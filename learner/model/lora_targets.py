"""What a low-rank adapter changes: the layers and experts of a model that `learner.model.lora.targets` selects."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from torch import nn
from transformers import AutoConfig, PreTrainedModel

from learner.model.footprint import blank_model
from learner.model.routers import routers_in
from learner.parallel.experts import experts_in
from learner.settings import LoraSettings
from rollout.wire.adapter import AdapterSpec
from rollout.wire.model_folder import pretrained


@dataclass(frozen=True, slots=True)
class Chosen:
    """What an adapter changes: linear layers, and parameters of experts [E, V, D], by their dotted names."""

    layers: tuple[str, ...]
    experts: tuple[str, ...]


def chosen(model: PreTrainedModel, settings: LoraSettings) -> Chosen:
    """The linear layers and experts that `settings.targets` selects; head and routers are never among them.

    ValueError, which lists what can be adapted, for a target that is none, and for "all-linear" with matrices that are
    neither (GPT-2 has layers of its own kind); and for experts in an adapter that is sent alone.
    """
    left = {model.get_output_embeddings(), *routers_in(model)}
    targets = settings.targets
    linear = [
        name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module not in left
    ]
    experts, beyond = _other_matrices(model)
    kinds = sorted({_kind(name) for name in (*linear, *experts)})
    if targets == "all-linear" and beyond:
        advice = (
            f"name the layers to adapt, if these suffice: learner.model.lora.targets={json.dumps(kinds)}"
            if kinds
            else "choose another model, or train without learner.model.lora"
        )
        raise ValueError(
            f"learner.model.lora.targets: all-linear would leave out {', '.join(beyond)}, which cannot be adapted: "
            f"they are neither linear layers nor experts; {advice}"
        )
    if not isinstance(targets, str):
        for target in targets:
            if target not in kinds or target in beyond:
                also = " everywhere" if target in kinds else ""
                raise ValueError(
                    f"learner.model.lora.targets: {target!r} is no linear layer{also} that can be adapted; choose "
                    f"from: {', '.join(kind for kind in kinds if kind not in beyond) or 'none in this model'}"
                )
        linear = [name for name in linear if _kind(name) in targets]
        experts = [name for name in experts if _kind(name) in targets]
    if experts and settings.sync == "adapter":
        raise ValueError(
            f"learner.model.lora.sync='adapter' cannot send the adapters of experts ({_kind(experts[0])}); use "
            "learner.model.lora.sync='merged', or targets without them"
        )
    return Chosen(tuple(linear), tuple(experts))


def planned(path: str, settings: LoraSettings, trusted: bool = False) -> AdapterSpec:
    """The adapter of a model's checkpoint, without reading its weights. ValueError as in `chosen`.

    trusted: code that comes with the model may be executed.
    """
    found = chosen(blank_model(pretrained(AutoConfig, path, trusted), trusted), settings)
    return AdapterSpec(settings.rank, settings.alpha, found.layers, found.experts)


class Sizes(NamedTuple):
    """Parameters of an adapter, entries of the matrices that it changes, and of those of experts among them.

    shapes: how many of its own matrices have which shape.
    """

    adapter: int = 0
    adapted: int = 0
    experts: int = 0
    shapes: tuple[tuple[tuple[int, int], int], ...] = ()

    @classmethod
    def of(cls, model: PreTrainedModel, settings: LoraSettings) -> Sizes:
        """Count those of a model of any device. ValueError as in `chosen`."""
        found, shapes = chosen(model, settings), Counter[tuple[int, int]]()
        layers = [model.get_parameter(f"{layer}.weight") for layer in found.layers]
        experts = [model.get_parameter(name) for name in found.experts]
        for name, matrix in zip((*found.layers, *found.experts), (*layers, *experts), strict=True):
            rows, columns = matrix.shape[-2:]
            if getattr(model.get_submodule(name.rpartition(".")[0]), "is_transposed", False):
                rows, columns = columns, rows  # experts [E, D, V]
            rank = settings.rank * matrix.shape[:-2].numel()  # of all experts together
            shapes.update([(rank, columns), (rows, rank)])
        factors = sum(count * prod(shape) for shape, count in shapes.items())
        adapted, of_experts = (sum(each.numel() for each in some) for some in ([*layers, *experts], experts))
        return cls(factors, adapted, of_experts, tuple(shapes.items()))


NO_ADAPTER = Sizes()


def _other_matrices(model: PreTrainedModel) -> tuple[list[str], list[str]]:
    """Matrices that are neither linear layers, embeddings nor routers: experts' by name, and the kinds of others."""
    experts, beyond, routers, mixed = list[str](), set[str](), routers_in(model), experts_in(model)
    for name, module in model.named_modules():
        if name in mixed:
            experts += [f"{name}.{each}" for each in _matrices(module, 3)]
        elif not isinstance(module, nn.Linear | nn.Embedding) and module not in routers:
            beyond |= {_kind(name) if each == "weight" else each for each in _matrices(module, 2)}
    return experts, sorted(beyond)


def _matrices(module: nn.Module, least: int) -> list[str]:
    """Names of a module's own parameters of at least so many dimensions; a bias is no matrix."""
    own = module.named_parameters(recurse=False)
    return [name for name, tensor in own if tensor.ndim >= least and not name.endswith("bias")]


def _kind(name: str) -> str:
    return name.rpartition(".")[2]
