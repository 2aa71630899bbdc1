"""The experts that a transformers model chooses for its tokens, recorded as it computes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rollout.engines.engine import as_bytes
from rollout.wire.module_names import layer_number, names_experts
from rollout.wire.trajectory import UInt8Array


class RoutingRecorder:
    """Watches what every layer's experts are given. ValueError for a model that has none."""

    def __init__(self, model: PreTrainedModel) -> None:
        config = model.config.get_text_config()
        self._layers = int(config.num_hidden_layers)
        self._step: dict[int, Tensor] = {}  # by layer: [T, K] of the pass under way
        self._width = 0
        for name, module in model.named_modules():
            layer = layer_number(name)
            if names_experts(name) and layer is not None:
                self._width = max(self._width, int(module.num_experts))
                module.register_forward_pre_hook(self._note_for(layer))
        if not self._width:
            raise ValueError("the model has no experts whose routing can be recorded")

    def taken(self) -> UInt8Array:
        """The experts of the tokens of the last pass: bytes [T, B] as they are stored."""
        tokens, chosen = next(iter(self._step.values())).shape
        experts_TLK = torch.zeros(tokens, self._layers, chosen, dtype=torch.int64)
        for layer, experts_TK in self._step.items():
            experts_TLK[:, layer] = experts_TK
        self._step.clear()
        found = as_bytes(experts_TLK.numpy().astype(np.uint8 if self._width <= 256 else np.uint16))
        assert found is not None
        return found

    def _note_for(self, layer: int) -> Any:
        def note(experts: nn.Module, given: tuple[Any, ...]) -> None:
            self._step[layer] = given[1]

        return note
