"""Products in float8 are those of the formats' definition; what must not be rounded to them is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from learner.data.batch import longest_row
from learner.model import float8
from learner.model.float8 import Float8, copied_bytes
from learner.model.loading import ModelError
from learner.model.policy import Policy
from learner.settings import ModelSettings
from learner.training.probe import probe_of
from tests.learner.held import Held

Array = np.ndarray[Any, np.dtype[Any]]
HALF = {"dtype": "bfloat16"}
FLOAT8 = HALF | {"float8": True}
# Bits of the fraction, least exponent of a normal number, largest number (Micikevicius et al. 2022, table 1).
E4M3, E5M2 = (3, -6, 448.0), (2, -14, 57344.0)


def _rounded(matrix: Array, form: tuple[int, int, float]) -> Array:
    """With one scale, which takes the largest number to the format's: to the nearest number, of two to the even one."""
    fraction, least, largest = form
    scale = np.abs(matrix).max() / largest
    exponents = np.maximum(np.floor(np.log2(np.abs(matrix / scale) + 1e-300)), least)
    unit = 2.0 ** (exponents - fraction)
    found: Array = np.rint(matrix / scale / unit) * unit * scale
    return found


@pytest.mark.parametrize("tokens", [1, 21, 32])
def test_products_are_those_of_rounded_matrices(tokens: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48))
    model.bfloat16()
    Float8(model, None, torch.device("cpu"))
    x = torch.randn(1, tokens, 64).bfloat16().requires_grad_()
    out = model(x)
    gradient = (torch.randn_like(out) * 1e-3).bfloat16()
    out.backward(gradient)
    weight, bias = (parameter.detach().double().numpy() for parameter in model.parameters())
    x_TD, dy_TV = x.detach()[0].double().numpy(), gradient[0].double().numpy()
    x8, weight8, dy8 = _rounded(x_TD, E4M3), _rounded(weight, E4M3), _rounded(dy_TV, E5M2)
    for found, expected in (
        (out[0], x8 @ weight8.T + bias),
        (x.grad[0], dy8 @ weight8),  # type: ignore[index]
        (model[0].weight.grad, dy8.T @ x8),
        (model[0].bias.grad, dy_TV.sum(0)),
    ):
        assert found is not None
        # Sums are rounded to bfloat16, some of them twice.
        atol = 2.0**-7 * np.abs(expected).max()
        np.testing.assert_allclose(found.detach().double().numpy(), expected, rtol=0, atol=atol)
    off = np.abs(x8 @ weight8.T - x_TD @ weight.T).max()
    assert off > 4 * np.abs(x8 @ weight8.T + bias - out[0].detach().double().numpy()).max() or tokens == 1


@pytest.mark.parametrize("at_once", [2**24, 2**11])
@pytest.mark.parametrize(
    ("tokens", "rows", "columns"), [(256, 64, 96), (256, 128, 32), (16, 256, 320), (96, 96, 96)]
)
def test_copies_take_the_bytes_that_are_told(
    tokens: int, rows: int, columns: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(float8, "_AT_ONCE", at_once)
    model = nn.Sequential(nn.Linear(columns, rows, bias=False)).bfloat16()
    Float8(model, None, torch.device("cpu"))
    for short in (0, 5):  # tokens that a GPU does not sum over as they are
        x = torch.randn(1, tokens - short, columns).bfloat16().requires_grad_()
        gradient = torch.randn(1, tokens - short, rows).bfloat16()
        with Held(but=torch.bfloat16) as held:  # which inputs and results are
            model(x).backward(gradient)
        told = copied_bytes(tokens, rows, columns)
        assert 0.95 * told <= held.most + 32 * short * (rows + columns) // 16 and held.most <= told + 64


def _settings(folder: Path, **model: Any) -> ModelSettings:
    return ModelSettings.model_validate({"path": str(folder), **model})


def test_head_embedding_and_layers_of_other_sizes_are_left_as_they_are() -> None:
    model = nn.Sequential(nn.Embedding(32, 32), nn.Linear(32, 32), nn.Linear(32, 24), nn.Linear(32, 16))
    Float8(model, model[3], torch.device("cpu"))
    assert [type(layer).__name__ for layer in model] == ["Embedding", "_Float8Linear", "Linear", "Linear"]


def _gradient(policy: Policy) -> torch.Tensor:
    logprobs_N, _ = policy.score(longest_row(24, 48), 1.0)
    logprobs_N.sum().backward()
    return torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])


@pytest.mark.parametrize("checkpointing", [False, True, "selective"])
def test_gradients_point_where_those_of_bfloat16_do(tiny: Path, checkpointing: bool | str) -> None:
    half = _gradient(Policy(_settings(tiny, **HALF)))
    low = _gradient(Policy(_settings(tiny, **FLOAT8, gradient_checkpointing=checkpointing)))
    assert not torch.equal(low, half)
    assert torch.cosine_similarity(low, half, dim=0) > 0.99


def test_a_version_is_proved_as_without_float8(tiny: Path) -> None:
    half, low = (Policy(_settings(tiny, **model)) for model in (HALF, FLOAT8))
    expected = probe_of(half, "bfloat16")
    low.probe_text = half.probe_text  # which each would draw by its own products
    assert probe_of(low, "bfloat16") == expected
    text = [list(half.probe_text)]
    rounded, plain = (each.score_texts(torch.tensor(text), widest=False) for each in (low, half))
    assert not np.array_equal(rounded, plain)


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ({"float8": True}, "set learner.model.dtype, now 'float32', to 'bfloat16'"),
        (FLOAT8 | {"lora": {}}, "leave out learner.model.lora"),
    ],
)
def test_what_excludes_float8_is_refused(tiny: Path, model: dict[str, Any], says: str) -> None:
    with pytest.raises(ModelError, match=says) as error:
        Policy(_settings(tiny, **model))
    assert "\n" not in str(error.value)


def test_a_gpu_without_such_products_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    with pytest.raises(ValueError, match="A100 multiplies no float8 numbers"):
        Float8(nn.Sequential(), None, torch.device("cuda"))
