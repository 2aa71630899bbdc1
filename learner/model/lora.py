"""Low-rank adaptation: the base is frozen, and a low-rank product is trained beside chosen linear layers.

    y = W x + alpha / rank * B A x        A [rank, D], B [V, rank]        Hu et al. 2021, section 4.1

B starts at zero, so that a model with a new adapter equals its base. Layers and files are PEFT's. Experts, whose
matrices transformers keeps in one parameter [E, V, D], have an A and a B each, and compute with W + alpha / rank * B A.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from learner.model.lora_targets import chosen
from learner.model.nf4 import as_matrices
from learner.model.shared_files import Folder, file_of
from learner.settings import LoraSettings
from rollout.wire.adapter import CONFIG_FILE, TENSOR_FILE, AdapterSpec

_NAME = "default"  # PEFT's name of a single adapter
_BASE = ".base_layer"  # PEFT's name of what it has wrapped
_OWN = ".lora_"  # how PEFT's names of A and B go on


class Adapter:
    """Adds A and B to the chosen matrices of `model` and freezes everything else.

    A is random, but the same in every model of one architecture. ValueError as in `chosen`.
    """

    def __init__(self, model: PreTrainedModel, settings: LoraSettings) -> None:
        from peft import LoraConfig, inject_adapter_in_model  # imported here: it takes seconds
        from peft.tuners.lora import LoraLayer

        self.settings = settings
        self._model = model
        found = chosen(model, settings)
        self.spec = AdapterSpec(settings.rank, settings.alpha, found.layers, found.experts)
        config = LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,
            target_modules=list(found.layers),
            target_parameters=list(found.experts),
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            inject_adapter_in_model(config, model, _NAME)
        # What holds A and B, by the matrix that they change, and its own name.
        self._adapted: dict[str, tuple[str, Any]] = {}
        for path, module in model.named_modules():
            if isinstance(module, LoraLayer):
                parameter = getattr(module, "parameter_name", "weight")
                self._adapted[f"{path.replace(_BASE, '')}.{parameter}"] = path, module
        self._paths = {path for path, _ in self._adapted.values()}
        # PEFT stores them as the base is, in whose narrow type steps of an optimizer would be lost.
        for parameter in self.parameters():
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))

    def parameters(self) -> Iterator[nn.Parameter]:
        """A and B of every matrix, which every rank holds whole."""
        for _, adapted in self._adapted.values():
            yield from (adapted.lora_A[_NAME].weight, adapted.lora_B[_NAME].weight)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """A and B of every matrix by their names in a file, detached; writing into them changes the model."""
        for path, adapted in self._adapted.values():
            yield from zip(self.spec.tensor_names(path), _factors(adapted), strict=True)

    def merged(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Merge the adapter into the model's whole parameters: W + alpha / rank * B A, in the adapter's type.

        Adapted matrices are new tensors, detached; the base is never changed. Names are those of the base model. A base
        in NF4 (`learner.model.nf4`) counts as the matrices that it computes with.
        """
        for name, tensor in as_matrices(self._model, tensors):
            own = self.base_name(name)
            if own in self._adapted:
                yield own, self._sum(self._adapted[own][1], tensor.detach())
            elif own is not None:
                yield own, tensor

    def base_name(self, name: str) -> str | None:
        """What a parameter is called in the base model; None: it is of the adapter."""
        return None if name.partition(_OWN)[0] in self._paths else name.replace(_BASE, "")

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

    def _sum(self, adapted: Any, base: Tensor) -> Tensor:
        """W + alpha / rank * B A of a matrix [V, D], or of each expert's of [E, V, D]."""
        a_RD, b_VR = _factors(adapted)
        base = base.to(a_RD.dtype)
        if base.ndim == 2:
            return torch.addmm(base, b_VR, a_RD, alpha=self.spec.scale)
        # PEFT's order: ranks of one expert are neighbors in A, and lie a number of experts apart in B.
        a_ERD = a_RD.view(len(base), self.spec.rank, -1)
        b_EVR = b_VR.view(-1, self.spec.rank, len(base)).permute(2, 0, 1)
        if getattr(adapted.get_base_layer(), "is_transposed", False):  # stored as [E, D, V]
            return torch.baddbmm(base, a_ERD.mT, b_EVR.mT, alpha=self.spec.scale)
        return torch.baddbmm(base, b_EVR, a_ERD, alpha=self.spec.scale)


def _factors(adapted: Any) -> tuple[Tensor, Tensor]:
    # Looked up each time, since PEFT may replace its parts.
    return adapted.lora_A[_NAME].weight.detach(), adapted.lora_B[_NAME].weight.detach()
