"""Low-rank adaptation: the base is frozen, and a low-rank product is trained beside chosen linear layers.

    y = W x + alpha / rank * B A x        A [rank, D], B [V, rank]        Hu et al. 2021, section 4.1

B starts at zero, so that a model with a new adapter equals its base. Layers and files are PEFT's.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from learner.model.footprint import blank_model
from learner.model.shared_files import Folder, file_of
from learner.settings import LoraSettings
from rollout.wire.adapter import CONFIG_FILE, TENSOR_FILE, AdapterSpec
from rollout.wire.model_folder import pretrained

_NAME = "default"  # PEFT's name of a single adapter
_BASE = ".base_layer."  # PEFT's name of the adapted layer


def chosen_layers(model: PreTrainedModel, targets: Sequence[str] | str) -> tuple[str, ...]:
    """The dotted names of the linear layers that `targets` selects; the head is never one of them.

    ValueError, which lists the layers that can be adapted, for a target that is none, and for "all-linear" with
    matrices that are not linear layers: transformers keeps experts in one parameter, and GPT-2 has layers of its own
    kind.
    """
    head = model.get_output_embeddings()
    linear = [
        name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head
    ]
    kinds = sorted({_kind(name) for name in linear})
    beyond = _matrices_beyond(model)
    if targets == "all-linear" and beyond:
        advice = (
            f"name the layers to adapt, if these suffice: learner.model.lora.targets={json.dumps(kinds)}"
            if kinds
            else "choose another model, or train without learner.model.lora"
        )
        raise ValueError(
            f"learner.model.lora.targets: all-linear would leave out {', '.join(beyond)}, which cannot be adapted: "
            f"they are not linear layers (experts in one parameter, or layers of another kind); {advice}"
        )
    if isinstance(targets, str):
        return tuple(linear)
    for target in targets:
        if target not in kinds or target in beyond:
            also = " everywhere" if target in kinds else ""
            raise ValueError(
                f"learner.model.lora.targets: {target!r} is no linear layer{also} that can be adapted; choose from: "
                f"{', '.join(kind for kind in kinds if kind not in beyond) or 'none in this model'}"
            )
    return tuple(name for name in linear if _kind(name) in targets)


def _matrices_beyond(model: PreTrainedModel) -> list[str]:
    """Names of matrices that are neither linear layers nor embeddings."""
    found = set()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            continue
        for parameter, tensor in module.named_parameters(recurse=False):
            if tensor.ndim > 1:
                found.add(_kind(name) if parameter == "weight" else parameter)
    return sorted(found)


def _kind(layer: str) -> str:
    return layer.rpartition(".")[2]


def planned(path: str, settings: LoraSettings, trusted: bool = False) -> AdapterSpec:
    """The adapter of a model's checkpoint, without reading its weights. ValueError as in `chosen_layers`.

    trusted: code that comes with the model may be executed.
    """
    model = blank_model(pretrained(AutoConfig, path, trusted), trusted)
    return AdapterSpec(settings.rank, settings.alpha, chosen_layers(model, settings.targets))


class Adapter:
    """Adds A and B to the chosen layers of `model` and freezes everything else.

    A is random, but the same in every model of one architecture. ValueError as in `chosen_layers`.
    """

    def __init__(self, model: PreTrainedModel, settings: LoraSettings) -> None:
        from peft import LoraConfig, inject_adapter_in_model  # imported here: it takes seconds

        self.settings = settings
        self.spec = AdapterSpec(settings.rank, settings.alpha, chosen_layers(model, settings.targets))
        config = LoraConfig(r=settings.rank, lora_alpha=settings.alpha, target_modules=list(self.spec.layers))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            inject_adapter_in_model(config, model, _NAME)
        self._adapted: dict[str, Any] = {layer: model.get_submodule(layer) for layer in self.spec.layers}
        # PEFT stores them as the base is, in whose narrow type steps of an optimizer would be lost.
        for parameter in self.parameters():
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))

    def parameters(self) -> Iterator[nn.Parameter]:
        """A and B of every layer, which every rank holds whole."""
        for layer in self.spec.layers:
            adapted = self._adapted[layer]
            yield from (adapted.lora_A[_NAME].weight, adapted.lora_B[_NAME].weight)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """A and B of every layer by their names in a file, detached; writing into them changes the model."""
        for layer in self.spec.layers:
            yield from zip(self.spec.tensor_names(layer), self._factors(layer), strict=True)

    def merged(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Merge the adapter into the model's whole parameters: W + alpha / rank * B A, in the adapter's type.

        Adapted matrices are new tensors, detached; the base is never changed. Names are those of the base model.
        """
        for name, tensor in tensors:
            layer, inside, parameter = name.partition(_BASE)
            own = self.base_name(name)
            if inside and parameter == "weight":
                a_RD, b_VR = self._factors(layer)
                base_VD = tensor.detach().to(a_RD.dtype)
                yield f"{layer}.weight", torch.addmm(base_VD, b_VR, a_RD, alpha=self.spec.scale)
            elif own is not None:
                yield own, tensor

    def base_name(self, name: str) -> str | None:
        """What a parameter is called in the base model; None: it is of the adapter."""
        if _BASE in name:
            return name.replace(_BASE, ".")
        return None if name.partition(".lora_")[0] in self._adapted else name

    def folder(self, lead: bool) -> Folder:
        """The adapter alone, as PEFT and vLLM read it, as it is now: a copy, which the lead writes."""
        config = json.dumps(self.spec.config(), indent=1)

        def write_config(folder: Path) -> None:
            (folder / CONFIG_FILE).write_text(config, encoding="utf-8")

        return Folder([file_of(TENSOR_FILE, dict(self.tensors()), lead)], write_config)

    def load(self, folder: Path) -> None:
        """Load what `folder` wrote. ValueError, one line, if it is missing, broken, or of another adapter."""
        self.put(self.read(folder))

    def read(self, folder: Path) -> dict[str, Tensor]:
        """Read what `folder` wrote, for `put` and `holding`; ValueError as in `load`."""
        try:
            found = load_file(folder / TENSOR_FILE)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"adapter {folder / TENSOR_FILE}: broken or missing file ({error})") from error
        for name, own in self.tensors():
            if name not in found or found[name].shape != own.shape:
                raise ValueError(
                    f"adapter {folder / TENSOR_FILE} does not fit: it has no {name} of shape {tuple(own.shape)}; use "
                    "the learner.model.lora settings that it was written with"
                )
        return found

    def put(self, tensors: Mapping[str, Tensor]) -> None:
        """Set A and B of every layer."""
        for name, own in self.tensors():
            own.copy_(tensors[name])

    @contextmanager
    def holding(self, tensors: Mapping[str, Tensor]) -> Iterator[None]:
        """Replace A and B inside the block; afterwards they are restored to the bit."""
        own = self.copy()
        self.put(tensors)
        try:
            yield
        finally:
            self.put(own)

    def copy(self) -> dict[str, Tensor]:
        """A copy of A and B, by name."""
        return {name: tensor.clone() for name, tensor in self.tensors()}

    def _factors(self, layer: str) -> tuple[Tensor, Tensor]:
        adapted = self._adapted[layer]  # looked up each time, since PEFT may replace its parts
        return adapted.lora_A[_NAME].weight.detach(), adapted.lora_B[_NAME].weight.detach()
