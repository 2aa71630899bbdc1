from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor

from learner.algorithm.algorithm import AlgorithmSettings
from learner.algorithm.corrections import AnyCorrection, effective_sample_share
from learner.data.batch import MicroBatch, TokenSequence, pack
from learner.training.step import PolicyObjective
from tests import reference

SECTIONS: list[dict[str, Any]] = [
    {"kind": "tis", "of": "token", "cap": 2.0},
    {"kind": "tis", "of": "sequence", "cap": 2.0},
    {"kind": "mask", "of": "token", "low": 0.5, "high": 2.0},
    {"kind": "mask", "of": "sequence", "low": 0.8, "high": 1.25},
    {"kind": "icepop", "low": 0.5, "high": 5.0},
    {"kind": "lag", "max_lag": 1},
]
# Four tokens: two sequences of two, with these ratios and lags. Products 1 and 16, geometric means 1 and 4.
RATIOS, SEQUENCES, LAGS = [0.25, 4.0, 2.0, 8.0], [0, 0, 1, 1], [0, 1, 2, 3]
BY_HAND = [
    [0.25, 2.0, 2.0, 2.0],
    [1.0, 1.0, 2.0, 2.0],
    [0.0, 0.0, 1.0, 0.0],
    [1.0, 1.0, 0.0, 0.0],
    [0.0, 4.0, 2.0, 0.0],
    [1.0, 1.0, 0.0, 0.0],
]


def _weights(section: dict[str, Any], log_ratios: Any, sequences: Any, lags: Any) -> Tensor:
    correct = TypeAdapter(AnyCorrection).validate_python(section)
    log_ratio_N = torch.as_tensor(log_ratios, dtype=torch.float64)
    return correct(log_ratio_N, torch.as_tensor(sequences), torch.as_tensor(lags))


@pytest.mark.parametrize(("section", "expected"), list(zip(SECTIONS, BY_HAND, strict=True)), ids=str)
def test_weights_equal_the_hand_computed_ones(section: dict[str, Any], expected: list[float]) -> None:
    # A hair below, since 2.0 lies on the bounds.
    weights_N = _weights(section, np.log(RATIOS) - 1e-9, SEQUENCES, LAGS)
    assert weights_N.tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("section", SECTIONS, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_weights_are_those_of_the_formulas(section: dict[str, Any], seed: int) -> None:
    rng = np.random.default_rng(seed)
    log_ratios, lags = rng.normal(0, 0.8, 50), rng.integers(0, 4, 50)
    sequences = rng.integers(0, 9, 50)
    expected = reference.correction(section, log_ratios.tolist(), sequences.tolist(), lags.tolist())
    np.testing.assert_allclose(_weights(section, log_ratios, sequences, lags), expected, rtol=1e-9)


@pytest.mark.parametrize("section", SECTIONS, ids=str)
def test_a_hopeless_ratio_stays_finite(section: dict[str, Any]) -> None:
    assert _weights(section, [800.0, -800.0], [0, 1], [0, 0]).isfinite().all()


@pytest.mark.parametrize(("weights", "share"), [([1, 1, 1, 1], 1.0), ([0, 0, 3, 0], 0.25), ([1, 3], 16 / 20)])
def test_the_share_of_effective_samples_by_hand(weights: list[float], share: float) -> None:
    sums = sum(weights), sum(weight**2 for weight in weights)
    assert effective_sample_share(*sums, len(weights)) == pytest.approx(share)
    assert reference.effective_share(weights) == pytest.approx(share)


def _row(behavior: list[float], versions: list[int]) -> MicroBatch:
    """One sequence: a prompt of one token, then sampled ones with advantage 1."""
    count = len(behavior)
    sampled_T = np.array([False] + [True] * count)
    sequence = TokenSequence(
        token_ids_T=np.zeros(count + 1, np.int32),
        sampled_T=sampled_T,
        behavior_logprobs_T=np.array([0.0, *behavior], np.float32),
        advantages_T=sampled_T.astype(np.float32),
        versions_T=np.array([-1, *versions], np.int32),
    )
    (row,) = pack([sequence], 100, 100).micro_batches
    return row


def _objective(corrections: list[dict[str, Any]], row: MicroBatch, logprobs_N: Tensor) -> Tensor:
    recipe = {"proximal": "learner", "loss": {"kind": "reinforce"}, "corrections": corrections}
    objective = PolicyObjective(AlgorithmSettings.model_validate(recipe), version=5)
    return objective(row, logprobs_N, torch.zeros_like(logprobs_N))[0]


def test_corrections_multiply_and_carry_no_gradient() -> None:
    # Ratios 4, 1 and 1; the last token is two versions old. Alone, the loss is -logprob with a slope of -1.
    logprobs_N = torch.log(torch.tensor([0.4, 0.2, 0.3], dtype=torch.float64)).requires_grad_()
    row = _row(np.log([0.1, 0.2, 0.3]).tolist(), [5, 5, 3])
    loss_N = _objective([{"kind": "tis", "cap": 2.5}, {"kind": "lag", "max_lag": 1}], row, logprobs_N)
    assert loss_N.tolist() == pytest.approx((-np.log([0.4, 0.2, 0.3]) * [2.5, 1, 0]).tolist(), rel=1e-6)
    (slopes_N,) = torch.autograd.grad(loss_N.sum(), logprobs_N)
    assert slopes_N.tolist() == pytest.approx([-2.5, -1, 0], rel=1e-6)


def test_a_masked_token_leaves_the_others_as_heavy_as_they_were() -> None:
    logprobs_N = torch.tensor([-1.0, -1.0], dtype=torch.float64)
    masked = [{"kind": "mask", "low": 0.5, "high": 2.0}]
    kept_N, out_N = (_objective(masked, _row([-1.0, other], [5, 5]), logprobs_N) for other in (-1.0, -9.0))
    assert (kept_N.tolist(), out_N.tolist()) == ([1.0, 1.0], [1.0, 0.0])


def test_a_token_that_the_engine_gave_no_chance_is_masked_and_harms_no_other() -> None:
    logprobs_N = torch.tensor([-1.0, -1.0], dtype=torch.float64, requires_grad=True)
    loss_N = _objective([{"kind": "mask"}], _row([-1.0, -9999.0], [5, 5]), logprobs_N)
    assert loss_N.tolist() == [1.0, 0.0]
    assert torch.autograd.grad(loss_N.sum(), logprobs_N)[0].tolist() == [-1.0, 0.0]
