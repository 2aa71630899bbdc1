"""Moments in eight bits are those of the paper, and AdamW over them learns what it learns with float32 ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoConfig

from learner.algorithm.schedule import OptimSettings
from learner.model.blockwise import dynamic_type
from learner.model.footprint import blank_model
from learner.training.eight_bit import block_of, dequantize, quantize
from learner.training.optim import Optimizer
from learner.training.stored_moments import StoredMoments
from tests.smollm2 import FOLDER, needs_smollm2

Array = np.ndarray[Any, np.dtype[Any]]
# What bitsandbytes' own tests allow as mean errors, absolute and relative, of a million numbers in blocks of 256.
PUBLISHED = {"normal": (0.011, 0.018), "uniform": (0.0023, 0.012)}


def _by_bits(code: int, bits: int) -> float:
    """A code without its sign: zeros, which are the power of ten, a one, and a fraction."""
    zeros = bits - code.bit_length()
    parts = 2 ** (bits - zeros - 1)
    return 10.0**-zeros * (0.1 + 0.9 * (code - parts + 0.5) / parts)


@pytest.mark.parametrize("signed", [True, False])
def test_the_dynamic_type_is_a_power_of_ten_and_a_fraction_in_the_other_bits(signed: bool) -> None:
    bits = 7 if signed else 8
    # What would have eight zeros is zero, and the one with seven, or the negative zero, the whole of the largest power.
    codes = range(1, 2**bits) if signed else range(2, 2**bits)
    positive = [_by_bits(code, bits) for code in codes]
    values = sorted([0.0, 1.0, *positive, *([-each for each in positive] if signed else [])])
    assert len(values) == 256
    np.testing.assert_allclose(dynamic_type(signed).numpy(), values, rtol=2e-6)


@pytest.mark.parametrize("drawn", ["normal", "uniform"])
def test_errors_are_within_those_that_are_published(drawn: str) -> None:
    random = torch.Generator().manual_seed(0)
    draw, signed = (torch.randn, True) if drawn == "normal" else (torch.rand, False)
    numbers_BC = draw(1024, 1024, generator=random).view(-1, 256)
    error = (dequantize(*quantize(numbers_BC, signed), signed) - numbers_BC).abs()
    absolute, relative = PUBLISHED[drawn]
    assert error.mean() < absolute and (error / (numbers_BC.abs() + 1e-8)).mean() < relative


def _stored(moment: Array, block: int, signed: bool) -> Array:
    """Equations 3 and 4 of Dettmers et al. 2022 in float64, and no code of zero for what is above it."""
    values = dynamic_type(signed).double().numpy()
    found = moment.copy().reshape(-1, block)
    for numbers in found:
        largest = np.abs(numbers).max() or 1.0
        near = np.abs(numbers[:, None] / largest - values).argmin(1)
        if not signed:
            near[numbers > 0] = np.maximum(near[numbers > 0], 1)
        numbers[:] = values[near] * largest
    return found.reshape(moment.shape)


@pytest.mark.parametrize(("shape", "block"), [((16, 576), 192), ((3, 7, 300), 210), ((256, 32), 32)], ids=str)
def test_steps_are_those_of_adamw_over_moments_that_the_paper_stores(
    shape: tuple[int, ...], block: int
) -> None:
    assert block_of(shape) == block
    random = np.random.default_rng(0)
    values = random.normal(size=shape)
    parameter = nn.Parameter(torch.tensor(values))  # float64: nothing but moments is rounded
    settings = OptimSettings(learning_rate=0.1, betas=(0.9, 0.95), max_grad_norm=1e9, moments="8bit")
    optimizer = Optimizer([parameter], settings)
    first, second = np.zeros(shape), np.zeros(shape)
    for step in range(1, 5):
        gradient = random.normal(size=shape) * 10.0 ** random.uniform(-6, 0, size=shape)
        optimizer.zero_grad()
        parameter.grad = torch.tensor(gradient)
        assert optimizer.step().applied
        first = 0.9 * first + 0.1 * gradient
        second = 0.95 * second + 0.05 * gradient**2
        values -= 0.1 * (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.95**step)) + 1e-8)
        first, second = _stored(first, block, True), _stored(second, block, False)
    error = np.abs(parameter.detach().numpy() - values)
    # float32 divides by scales: a number in the middle between two codes may get the other one.
    assert (error > 1e-6).mean() < 1e-3 and error.max() < 0.05


def test_a_number_far_below_its_block_moves_no_farther_than_the_others() -> None:
    parameter = nn.Parameter(torch.zeros(64, 256))
    gradient = torch.ones(64, 256)
    gradient[:, ::2] = 1e-5  # its square is below the least code
    optimizer = Optimizer([parameter], OptimSettings(learning_rate=1.0, max_grad_norm=1e9, moments="8bit"))
    for _ in range(5):
        optimizer.zero_grad()
        parameter.grad = gradient.clone()
        optimizer.step()
    assert ((parameter > -5.2) & (parameter < 0)).all()


def test_a_small_network_learns_as_with_float32_moments() -> None:
    def taught(moments: Any) -> float:
        torch.manual_seed(0)
        teacher, student = (nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64)) for _ in range(2))
        settings = OptimSettings(learning_rate=1e-2, moments=moments)
        optimizer = Optimizer(student.parameters(), settings)
        for _ in range(100):
            x = torch.randn(64, 64)
            optimizer.zero_grad()
            loss = (student(x) - teacher(x)).square().mean()
            loss.backward()
            optimizer.step()
        return float(loss.detach())

    plain, coded = taught("float32"), taught("8bit")
    assert coded != plain and coded < 1.1 * plain and plain < 0.02


def _trained(moments: Any, steps: int, state: dict[str, Any] | None = None) -> tuple[nn.Parameter, Optimizer]:
    parameter = nn.Parameter(torch.ones(64, 128))
    optimizer = Optimizer([parameter], OptimSettings(learning_rate=0.1, moments=moments))
    if state is not None:
        optimizer.load_state_dict(state)
    for step in range(steps):
        optimizer.zero_grad()
        torch.manual_seed(step)
        parameter.grad = torch.randn(64, 128)
        optimizer.step()
    return parameter, optimizer


def test_a_stored_state_becomes_what_the_settings_say() -> None:
    whole = _trained("float32", 2)[1].state_dict()
    (plain,) = whole["moments"].values()
    _, optimizer = _trained("8bit", 0, whole)
    (coded,) = optimizer.state_dict()["moments"].values()
    assert {name: tensor.dtype for name, tensor in coded.items() if tensor.ndim} == {
        "exp_avg": torch.uint8,
        "exp_avg_scales": torch.float32,
        "exp_avg_sq": torch.uint8,
        "exp_avg_sq_scales": torch.float32,
    }
    _, again = _trained("float32", 0, optimizer.state_dict())
    (back,) = again.state_dict()["moments"].values()
    assert again.steps == 2 and torch.equal(back["step"], plain["step"])
    for name, signed in (("exp_avg", True), ("exp_avg_sq", False)):
        stored = _stored(plain[name].double().numpy(), 128, signed)
        np.testing.assert_allclose(back[name].numpy(), stored, rtol=1e-6)


def _held(optimizer: Optimizer) -> int:
    return sum(moment.nbytes for moment in optimizer.held())


@pytest.mark.parametrize("moments", ["float32", "8bit"])
def test_room_for_moments_to_come_is_what_the_first_step_takes(moments: Any) -> None:
    parameters = [nn.Parameter(torch.ones(64, 96)), nn.Parameter(torch.ones(7))]
    optimizer = Optimizer(parameters, OptimSettings(moments=moments))

    def room() -> int:
        return sum(each.nbytes for each in optimizer.moments_to_come())

    before = room()
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert before - room() == _held(optimizer)


@needs_smollm2
def test_vectors_stay_in_float32_and_matrices_take_a_byte_and_their_scales() -> None:
    model = blank_model(AutoConfig.from_pretrained(FOLDER))
    stored = StoredMoments(torch.optim.AdamW(model.parameters()), on_host=False, eight_bit=True)
    nbytes = expected = vectors = 0
    for parameter in model.parameters():
        nbytes += sum(tensor.nbytes for tensor in stored._zeros(parameter).values() if tensor.ndim)
        if parameter.ndim < 2:
            expected, vectors = expected + 8 * parameter.numel(), vectors + 1
        else:
            blocks = {576: 3, 1536: 6}[parameter.shape[1]]  # of 192 numbers, and of 256
            expected += 2 * (parameter.numel() + 4 * blocks * len(parameter))
    assert nbytes == expected and vectors == 61
