"""A matrix in NF4 is what the paper says it is; a layer of it computes as one of the dequantized matrix does."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from learner.model.nf4 import BITS, EIGHT_BITS, NF4, Nf4Linear, dequantize, quantize, stored_bytes
from learner.model.saved_tensors import SavedTensors

# Dettmers et al. 2023, appendix E.
APPENDIX_E = [
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
]
# bitsandbytes' own tests expect these mean errors of standard normal numbers in blocks of 64.
PUBLISHED_ERROR, PUBLISHED_RELATIVE = 0.072792, 0.203299


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_codes_are_those_of_the_appendix_and_quantiles_of_a_normal_distribution() -> None:
    assert NF4.tolist() == APPENDIX_E
    # Section 3: 2^k + 1 quantiles of either half, without the outermost, in relation to the largest.
    outermost = 1 - (1 / 30 + 1 / 32) / 2
    upper = [NormalDist().inv_cdf(p) for p in np.linspace(outermost, 0.5, 9)[:-1]]
    lower = [-NormalDist().inv_cdf(p) for p in np.linspace(outermost, 0.5, 8)[:-1]]
    quantiles = sorted([*lower, 0.0, *upper])
    np.testing.assert_allclose(NF4.numpy(), np.array(quantiles) / max(quantiles), atol=2e-6)


def by_the_paper(matrix: np.ndarray) -> np.ndarray:
    """Equations 1 to 6 in float64: nearest values by search, blocks one by one."""

    def coded(numbers: np.ndarray, size: int, values: np.ndarray) -> np.ndarray:
        found = []
        for begin in range(0, len(numbers), size):
            block = numbers[begin : begin + size]
            largest = np.abs(block).max() or 1.0
            near = np.abs(block[:, None] / largest - values).argmin(1)
            found.append(values[near] * largest)
        return np.concatenate(found)

    flat, nf4 = matrix.astype(np.float64).ravel(), NF4.double().numpy()
    largest = np.array([np.abs(flat[begin : begin + 64]).max() for begin in range(0, len(flat), 64)])
    scales = coded(largest - largest.mean(), 256, EIGHT_BITS.double().numpy()) + largest.mean()
    units = coded(flat, 64, nf4) / np.repeat(largest, 64)[: len(flat)]
    return (units * np.repeat(scales, 64)[: len(flat)]).reshape(matrix.shape)


@pytest.mark.parametrize("shape", [(64, 64), (300, 192), (130, 96), (5, 7)], ids=str)
def test_a_matrix_comes_back_as_the_paper_computes_it(shape: tuple[int, int]) -> None:
    matrix = _normal(*shape) * 0.02
    found = dequantize(quantize(matrix), matrix.shape, torch.float32)
    np.testing.assert_allclose(found.numpy(), by_the_paper(matrix.numpy()), rtol=0, atol=1e-8)
    half = dequantize(quantize(matrix), matrix.shape, torch.bfloat16)
    assert torch.equal(half, found.bfloat16())


def test_eight_bits_of_a_scale_are_the_dynamic_type() -> None:
    """A sign, a power of ten, and a fraction in the bits that the power leaves: centres of equal parts."""
    values = {0.0, 1.0}
    for zeros in range(7):
        parts = 2 ** (6 - zeros)
        centres = 0.1 + 0.9 * (np.arange(parts) + 0.5) / parts
        values |= {sign * 10.0**-zeros * centre for sign in (1, -1) for centre in centres}
    np.testing.assert_allclose(EIGHT_BITS.numpy(), sorted(values), rtol=2e-7)
    assert len(EIGHT_BITS) == 256


def test_errors_of_normal_numbers_are_those_that_bitsandbytes_has() -> None:
    numbers = _normal(1024, 1024)
    error = (dequantize(quantize(numbers), numbers.shape, torch.float32) - numbers).abs()
    assert float(error.mean()) == pytest.approx(PUBLISHED_ERROR, abs=4e-4)
    assert float((error / (numbers.abs() + 1e-8)).mean()) == pytest.approx(PUBLISHED_RELATIVE, abs=2e-3)


def test_a_number_takes_4_127_bits() -> None:
    assert pytest.approx(4.127, abs=5e-5) == BITS
    shape = torch.Size((1024, 2048))
    stored = quantize(torch.ones(shape))
    assert stored.nbytes == stored_bytes(shape.numel())
    assert 8 * stored.nbytes / shape.numel() == pytest.approx(BITS, abs=1e-4)


def test_zeros_stay_zeros_and_numbers_that_are_not_finite_are_refused() -> None:
    matrix = _normal(8, 128)
    matrix[2:5] = 0
    assert not dequantize(quantize(matrix), matrix.shape, torch.float32)[2:5].any()
    assert not dequantize(quantize(matrix * 0), matrix.shape, torch.float32).any()
    for broken in (float("nan"), float("inf")):
        matrix[7, 5] = broken
        with pytest.raises(ValueError, match="not finite"):
            quantize(matrix)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_layer_is_the_plain_one_of_its_matrix_and_keeps_only_what_is_stored(dtype: torch.dtype) -> None:
    plain = nn.Linear(96, 128).requires_grad_(False)
    layer = Nf4Linear(plain)
    matrix = dequantize(layer.weight, layer.shape, dtype)
    found = []
    for compute in (layer, lambda x: nn.functional.linear(x, matrix, plain.bias)):
        plain.bias.data = plain.bias.data.to(dtype)
        given = _normal(2, 5, 96, seed=1).to(dtype).requires_grad_()
        with (saved := SavedTensors()):
            out = compute(given)
        out.backward(_normal(2, 5, 128, seed=2).to(dtype))
        found.append((out.detach(), given.grad, saved.nbytes))
    (out, grad, held), (want, want_grad, plain_held) = found
    assert torch.equal(out, want) and torch.equal(grad, want_grad)
    assert held == stored_bytes(96 * 128) and plain_held == 96 * 128 * dtype.itemsize
