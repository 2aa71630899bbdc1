"""The tensors of a model that an engine serves, by their names in its checkpoint."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from rollout.wire.adapter import AdapterSpec
from rollout.wire.model_folder import pretrained


def checkpoint_names(model: str, trusted: bool = False) -> list[str]:
    """Tensor names of a whole version of this model, derived from its architecture; a tied tensor appears once.

    The files of weights are not read, since they may contain a tied head too. trusted: code that comes with the model
    may be executed.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.core_model_loading import revert_weight_conversion

    config = pretrained(AutoConfig, model, trusted)
    sees = getattr(config, "vision_config", None) is not None
    kind: Any = AutoModelForImageTextToText if sees else AutoModelForCausalLM
    with torch.device("meta"):
        skeleton = kind.from_config(config, trust_remote_code=trusted)
    return list(revert_weight_conversion(skeleton, dict(skeleton.named_parameters())))


def require_layers(
    name: str, model: str, names: Collection[str], adapters: Sequence[AdapterSpec], learned: bool
) -> None:
    """ValueError if a model with tensors of these names lacks a layer of an adapter.

    name: of the engine; learned: its versions are the adapter, which is not served beside others.
    """
    if missing := [layer for adapter in adapters for layer in adapter.missing_from(names)]:
        advice = "use learner.model.lora.sync='merged'" if learned else "give the base that it was trained on"
        raise ValueError(
            f"{name}: model {model} has no tensor {missing[0]}.weight, which the adapter changes; {advice}"
        )
