"""A low-rank adapter on the wire: the matrices it changes, and the names of its tensors and files.

    W + alpha / rank * B A        A [rank, D], B [V, rank]

Names and files are PEFT's, which vLLM reads too.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONFIG_FILE, TENSOR_FILE = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True, slots=True)
class AdapterSpec:
    """The matrices W that an adapter changes, by the names of their layers in the checkpoint (without ".weight").

    experts: parameters of transformers' modules of experts, which no engine takes an adapter of.
    """

    rank: int
    alpha: int
    layers: tuple[str, ...]
    experts: tuple[str, ...] = ()

    @classmethod
    def read(cls, folder: Path) -> AdapterSpec:
        """Read an adapter's folder, to serve it.

        ValueError, one line, for one that names no layers in full, as `config` does, or that changes experts.
        """
        file = folder / CONFIG_FILE
        try:
            stored = json.loads(file.read_text(encoding="utf-8"))
            layers = stored["target_modules"]
            if not isinstance(layers, list):
                raise TypeError(f"target_modules is {layers!r:.80}, not a list of layers")
            experts = stored.get("target_parameters")
            found = cls(int(stored["r"]), int(stored["lora_alpha"]), tuple(map(str, layers)))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file} describes no adapter that Manta wrote ({error!r})") from error
        if experts:
            raise ValueError(
                f"{file}: the adapter changes experts ({experts[0]}), which engines do not serve beside their model; "
                "serve the merged model, which is written around it"
            )
        return found

    @property
    def scale(self) -> float:
        """Factor of B A."""
        return self.alpha / self.rank

    @staticmethod
    def tensor_names(layer: str) -> tuple[str, str]:
        """Names of a layer's A and B."""
        return f"base_model.model.{layer}.lora_A.weight", f"base_model.model.{layer}.lora_B.weight"

    @property
    def names(self) -> list[str]:
        """Names of all tensors, layer by layer."""
        return [name for layer in self.layers for name in self.tensor_names(layer)]

    def missing_from(self, checkpoint_names: Iterable[str]) -> list[str]:
        """Layers whose matrix is not among the tensor names of a checkpoint."""
        held = set(checkpoint_names)
        return [layer for layer in self.layers if f"{layer}.weight" not in held]

    def config(self) -> dict[str, Any]:
        """Content of adapter_config.json."""
        beside = {"target_parameters": list(self.experts)} if self.experts else {}
        return beside | {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "r": self.rank,
            "lora_alpha": self.alpha,
            "target_modules": list(self.layers),
            "bias": "none",
        }
