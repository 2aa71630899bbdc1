"""What is told of a model by its configuration is what the model itself has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig

from learner.data.batch import longest_row
from learner.model.footprint import blank_model, saved_by, shape_of
from learner.model.policy import Policy
from learner.settings import ModelSettings
from tests.families import build_family
from tests.qwen3 import QWEN3_06B, QWEN3_8B, Qwen3
from tests.smollm2 import FOLDER, needs_smollm2


@pytest.mark.parametrize(("model", "published"), [(QWEN3_06B, 596_049_920), (QWEN3_8B, 8_190_735_360)])
def test_parameters_are_those_that_are_published(model: Qwen3, published: int, tmp_path: Path) -> None:
    assert model.parameters == published
    shape = shape_of(blank_model(AutoConfig.from_pretrained(model.write(tmp_path))))
    assert (shape.parameters, shape.layers) == (published, model.layers)
    assert shape.outside_layers + model.layers * shape.largest_layer == published


@needs_smollm2
def test_the_real_models_parameters_are_those_in_its_file() -> None:
    with safe_open(FOLDER / "model.safetensors", framework="np") as tensors:
        stored = sum(tensors.get_tensor(name).size for name in tensors.keys())  # noqa: SIM118
    assert shape_of(blank_model(AutoConfig.from_pretrained(FOLDER))).parameters == stored


def _activations(folder: Path, tokens: int, **model: Any) -> int:
    """Bytes of activations that autograd really saves of a row."""
    policy = Policy(ModelSettings(path=str(folder), **model))
    weights = {p.untyped_storage().data_ptr() for p in policy.parameters()}
    held: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        alive = policy.hidden(longest_row(tokens + 1, tokens))
    del alive
    # The head is not used, and an embedding's backward pass needs no weights.
    embedding = policy.model.get_input_embeddings().weight.numel()
    copied = 2 * (sum(p.numel() for p in policy.parameters()) - embedding) if model else 0
    return sum(held.values()) - copied


@pytest.mark.parametrize("model", [{}, {"dtype": "bfloat16"}], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("mixed", [False, True], ids=["dense", "mixture"])
def test_what_a_row_saves_is_told_without_weights(
    tiny: Path, tmp_path: Path, mixed: bool, model: dict[str, Any]
) -> None:
    if mixed:
        build_family("Qwen3-30B-A3B", False, tmp_path)
    folder = tmp_path if mixed else tiny
    saved = saved_by(AutoConfig.from_pretrained(folder), model.get("dtype", "float32"))
    real = _activations(folder, 96, **model)
    assert saved is not None and saved.row(96, 2, checkpointing=False) == pytest.approx(real, rel=0.05)
    checkpointed = saved.row(96, 2, checkpointing=True)
    assert 0.4 < checkpointed / real < 0.75  # one of two layers, and the inputs of both


@needs_smollm2
def test_what_a_row_of_the_real_model_saves_is_told_without_its_weights() -> None:
    saved = saved_by(AutoConfig.from_pretrained(FOLDER), "bfloat16")
    real = _activations(FOLDER, 128, dtype="bfloat16")
    assert saved.row(128, 30, checkpointing=False) == pytest.approx(real, rel=0.05)
