from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import nn

from learner.algorithm.schedule import OptimSettings, learning_rate
from learner.training import stored_moments
from learner.training.optim import Optimizer, subnormals_as_zero


def test_subnormal_numbers_are_zero_inside_alone() -> None:
    tiny = torch.full((4,), 1e-40)
    with subnormals_as_zero():
        assert not (tiny * 1.0).any()
    assert (tiny * 1.0).all()


def test_steps_equal_naive_adamw_with_clipping() -> None:
    settings = OptimSettings(learning_rate=0.1, betas=(0.8, 0.9), weight_decay=0.05, max_grad_norm=1.0)
    matrix, vector = nn.Parameter(torch.tensor([[1.0, -2.0]])), nn.Parameter(torch.tensor([0.5]))
    optimizer = Optimizer([matrix, vector], settings)
    values = np.array([1.0, -2.0, 0.5])
    decay = np.array([0.05, 0.05, 0.0])
    first, second = np.zeros(3), np.zeros(3)
    for step in range(1, 5):
        gradient = np.array([3.0, -1.0, 2.0]) / step
        optimizer.zero_grad()
        matrix.grad = torch.tensor(gradient[None, :2], dtype=torch.float32)
        vector.grad = torch.tensor(gradient[2:], dtype=torch.float32)
        report = optimizer.step()
        norm = np.linalg.norm(gradient)
        assert report.grad_norm == pytest.approx(norm, rel=1e-6)
        gradient = gradient * min(1.0, 1.0 / float(norm))
        first = 0.8 * first + 0.2 * gradient
        second = 0.9 * second + 0.1 * gradient**2
        values = values * (1 - 0.1 * decay)
        update = (first / (1 - 0.8**step)) / (np.sqrt(second / (1 - 0.9**step)) + 1e-8)
        values = values - 0.1 * update
    np.testing.assert_allclose([*matrix[0].tolist(), vector.item()], values, rtol=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(bad: float) -> None:
    parameter = nn.Parameter(torch.ones(2, 2))
    optimizer = Optimizer([parameter], OptimSettings(learning_rate=0.1))
    optimizer.zero_grad()
    parameter.grad = torch.zeros_like(parameter)
    parameter.grad[0, 0] = bad
    report = optimizer.step()
    assert not report.applied
    assert optimizer.steps == 0
    assert torch.equal(parameter, torch.ones(2, 2))


def test_a_gradient_of_zero_is_no_step() -> None:
    parameter = nn.Parameter(torch.ones(2, 2))
    optimizer = Optimizer([parameter], OptimSettings(learning_rate=0.1, weight_decay=0.5))
    for gradient in (1.0, 0.0):
        before = parameter.detach().clone()
        optimizer.zero_grad()
        parameter.grad = torch.full_like(parameter, gradient)
        report = optimizer.step()
        assert report.idle == torch.equal(parameter, before) == (gradient == 0.0)
    assert optimizer.steps == 1


@pytest.mark.parametrize("moments", ["float32", "8bit"])
def test_moments_in_host_memory_change_no_bit(
    moments: Literal["float32", "8bit"], monkeypatch: pytest.MonkeyPatch
) -> None:
    for part in ("PART", "AT_ONCE_CPU"):
        monkeypatch.setattr(stored_moments, part, 64)  # several parts, the last one of another length

    def moved(offload: bool) -> tuple[list[torch.Tensor], dict[str, Any]]:
        random = torch.Generator().manual_seed(0)
        parameters = [
            nn.Parameter(torch.randn(shape, generator=random))
            for shape in ((37, 11), (5,), (129, 48), (1, 1))
        ]
        settings = OptimSettings(
            learning_rate=0.1, weight_decay=0.2, max_grad_norm=1.0, moments=moments, offload=offload
        )
        optimizer = Optimizer(parameters, settings)
        for step in range(3):
            optimizer.zero_grad()
            for parameter in parameters if step else parameters[:-1]:  # no row reached the last one
                parameter.grad = torch.randn(parameter.shape, generator=random)
            assert optimizer.step().applied
        return [parameter.detach() for parameter in parameters], optimizer.state_dict()

    (plain, state), (offloaded, on_host) = moved(False), moved(True)
    assert all(map(torch.equal, plain, offloaded))
    assert on_host.keys() == state.keys() and on_host["steps"] == state["steps"] == 3
    assert on_host["moments"].keys() == state["moments"].keys()
    for place, moments in state["moments"].items():
        assert on_host["moments"][place].keys() == moments.keys()
        assert all(torch.equal(on_host["moments"][place][name], moments[name]) for name in moments)


def test_schedules_rise_hold_and_fall() -> None:
    constant = OptimSettings(learning_rate=1.0, warmup_steps=4)
    assert [learning_rate(constant, s) for s in (0, 1, 3, 4, 99)] == [0.25, 0.5, 1.0, 1.0, 1.0]
    linear = OptimSettings(learning_rate=1.0, warmup_steps=2, schedule="linear")
    assert [learning_rate(linear, s, 6) for s in (2, 3, 4, 6, 7)] == [1.0, 0.75, 0.5, 0.0, 0.0]
    cosine = OptimSettings(learning_rate=1.0, schedule="cosine", final_share=0.2)
    assert [learning_rate(cosine, s, 4) for s in (0, 2, 4)] == pytest.approx([1.0, 0.6, 0.2])


@pytest.mark.parametrize(
    "options",
    [
        {"betas": (0.9, 1.0)},
        {"betas": (-0.1, 0.9)},
        {"betas": (1.5, 2.0)},
        {"eps": 0.0},
        *(
            {name: bad}
            for name in ("learning_rate", "eps", "weight_decay", "max_grad_norm")
            for bad in (-1.0, math.inf)
        ),
        *(
            {name: math.nan}
            for name in ("learning_rate", "eps", "weight_decay", "max_grad_norm", "final_share")
        ),
    ],
    ids=str,
)
def test_settings_that_no_step_can_follow_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(options))):
        OptimSettings(**options)


def test_where_no_step_is_made_any_schedule_will_do() -> None:
    falling = OptimSettings(learning_rate=1.0, warmup_steps=5, schedule="linear")
    Optimizer(torch.nn.Linear(1, 1).parameters(), falling, total_steps=0)


def test_a_schedule_without_an_end_is_refused() -> None:
    parameters = [nn.Parameter(torch.ones(1))]
    for settings, end in (
        (OptimSettings(schedule="cosine"), None),
        (OptimSettings(schedule="linear", warmup_steps=5), 5),
    ):
        with pytest.raises(ValueError, match="there must be steps between"):
            Optimizer(parameters, settings, end)
