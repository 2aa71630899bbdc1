"""Low-rank adaptation: the base stays as it is, and beside chosen linear layers a small product is learned.

    y = W x + alpha / rank * B A x        A [rank, D], B [V, rank]        Hu et al. 2021, section 4.1

B begins as zeros, so that a model with a new adapter is its base. The layers are PEFT's, and so are the files.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from learner.settings import LoraSettings
from rollout.wire.adapter import CONFIG_FILE, TENSOR_FILE, AdapterSpec
from rollout.wire.model_folder import pretrained

_NAME = "default"  # PEFT's, of the one adapter there is
_BASE = ".base_layer."  # where PEFT puts the layer it adapts


def chosen_layers(model: PreTrainedModel, targets: Sequence[str] | str) -> tuple[str, ...]:
    """The dotted names of the model's linear layers that `targets` means; the head is never one of them.

    ValueError, naming the layers there are, where one is no such layer, and where matrices that are meant are none:
    transformers keeps the experts of a mixture in one parameter, and GPT-2's layers are of a kind of their own.
    """
    head = model.get_output_embeddings()
    linear = [
        name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head
    ]
    kinds = sorted({_kind(name) for name in linear})
    beyond = _matrices_beyond(model)
    if targets == "all-linear" and beyond:
        advice = (
            f"name layers that can, if they are enough: learner.model.lora.targets={json.dumps(kinds)}"
            if kinds
            else "choose another model, or train without learner.model.lora"
        )
        raise ValueError(
            f"learner.model.lora.targets: all-linear would leave out {', '.join(beyond)}, which are not linear layers "
            f"here (experts in one parameter, layers of a kind of their own) and cannot be adapted; {advice}"
        )
    if isinstance(targets, str):
        return tuple(linear)
    for target in targets:
        if target not in kinds or target in beyond:
            also = " everywhere" if target in kinds else ""
            raise ValueError(
                f"learner.model.lora.targets: {target!r} is no linear layer{also} that can be adapted; there are "
                f"{', '.join(kind for kind in kinds if kind not in beyond) or 'none in this model'}"
            )
    return tuple(name for name in linear if _kind(name) in targets)


def _matrices_beyond(model: PreTrainedModel) -> list[str]:
    """What matrices are called that are neither linear layers nor embeddings."""
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


def planned(path: str, settings: LoraSettings) -> AdapterSpec:
    """The adapter that a model's checkpoint would get; its weights are not read. ValueError as of `chosen_layers`."""
    config = pretrained(AutoConfig, path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return AdapterSpec(settings.rank, settings.alpha, chosen_layers(model, settings.targets))


class Adapter:
    """Puts A and B beside the chosen layers of `model` and freezes everything else.

    A is random, but the same in every model of one architecture. ValueError as of `chosen_layers`.
    """

    def __init__(self, model: PreTrainedModel, settings: LoraSettings) -> None:
        from peft import LoraConfig, inject_adapter_in_model  # it takes seconds: only who adapts waits for it

        self.settings = settings
        self.spec = AdapterSpec(settings.rank, settings.alpha, chosen_layers(model, settings.targets))
        config = LoraConfig(r=settings.rank, lora_alpha=settings.alpha, target_modules=list(self.spec.layers))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            inject_adapter_in_model(config, model, _NAME)
        self._adapted: dict[str, Any] = {layer: model.get_submodule(layer) for layer in self.spec.layers}

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """A and B of every layer under their names in a file, detached; writing into them changes the model."""
        for layer in self.spec.layers:
            yield from zip(self.spec.tensor_names(layer), self._factors(layer), strict=True)

    def merged(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The model's parameters or state as if it had learned without an adapter: W + alpha / rank * B A.

        Adapted matrices are new tensors, detached; the base is never written to. Names are those of the bare model.
        """
        for name, tensor in tensors:
            layer, inside, parameter = name.partition(_BASE)
            if inside and parameter == "weight":
                a_RD, b_VR = self._factors(layer)
                yield f"{layer}.weight", torch.addmm(tensor.detach(), b_VR, a_RD, alpha=self.spec.scale)
            elif inside:
                yield f"{layer}.{parameter}", tensor
            elif name.partition(".lora_")[0] not in self._adapted:
                yield name, tensor

    def save(self, folder: Path) -> None:
        """Write the adapter alone, as PEFT and vLLM read it."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in self.tensors()}, folder / TENSOR_FILE)
        (folder / CONFIG_FILE).write_text(json.dumps(self.spec.config(), indent=1), encoding="utf-8")

    def load(self, folder: Path) -> None:
        """Take over what `save` wrote. ValueError, in one line, where it is missing, broken, or another adapter's."""
        self.put(self.read(folder))

    def read(self, folder: Path) -> dict[str, Tensor]:
        """What `save` wrote, for `put` and `holding`; ValueError as of `load`."""
        try:
            found = load_file(folder / TENSOR_FILE)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"adapter {folder / TENSOR_FILE} cannot be read: {error}") from error
        for name, own in self.tensors():
            if name not in found or found[name].shape != own.shape:
                raise ValueError(
                    f"adapter {folder / TENSOR_FILE} is another one: it has no {name} of {tuple(own.shape)}; "
                    "was it written under other learner.model.lora settings?"
                )
        return found

    def put(self, tensors: Mapping[str, Tensor]) -> None:
        """Set A and B of every layer."""
        for name, own in self.tensors():
            own.copy_(tensors[name])

    @contextmanager
    def holding(self, tensors: Mapping[str, Tensor]) -> Iterator[None]:
        """For as long as this lasts the model has these A and B; afterwards its own again, to the bit."""
        own = self.copy()
        self.put(tensors)
        try:
            yield
        finally:
            self.put(own)

    def copy(self) -> dict[str, Tensor]:
        """A and B as they are now, by name."""
        return {name: tensor.clone() for name, tensor in self.tensors()}

    def _factors(self, layer: str) -> tuple[Tensor, Tensor]:
        adapted = self._adapted[layer]  # PEFT's, whose parts may be replaced: looked up each time
        return adapted.lora_A[_NAME].weight.detach(), adapted.lora_B[_NAME].weight.detach()
