"""Statistics of a step are those of all its tokens, whatever rows they came in."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.algorithm.algorithm import AlgorithmSettings
from learner.data.batch import MicroBatch, longest_row
from learner.training.metric_reduce import Means, Part, Ratios
from learner.training.step import PolicyObjective
from tests import reference

tokens = st.tuples(st.floats(0.01, 100), st.integers(0, 2))  # ratio, lag


def test_rows_that_agree_in_themselves_alone_are_no_full_sample() -> None:
    means = Means()
    for ratio in (1.0, 100.0):
        means.add({"share": Ratios(Part(torch.full((10,), ratio), 10)), "mean": torch.full((10,), ratio)})
    assert means.values() == {"share": pytest.approx(1010**2 / (20 * 100_010)), "mean": 50.5}


@given(rows=st.lists(st.lists(tokens, max_size=6), min_size=1, max_size=4))
@settings(max_examples=25)
def test_shares_and_means_of_a_part_are_those_over_all_rows(rows: list[list[tuple[float, int]]]) -> None:
    means = Means()
    for row in rows:
        ratio_N = torch.tensor([ratio for ratio, _ in row], dtype=torch.float64)
        for lag in range(3):
            here_N = torch.tensor([other == lag for _, other in row], dtype=torch.bool)
            part = Part(torch.where(here_N, ratio_N, 0.0), sum(other == lag for _, other in row))
            means.add({f"share {lag}": Ratios(part), f"mean {lag}": part})
    expected = {}
    for lag in range(3):
        if found := [ratio for row in rows for ratio, other in row if other == lag]:
            expected[f"share {lag}"] = pytest.approx(reference.effective_share(found))
            expected[f"mean {lag}"] = pytest.approx(sum(found) / len(found))
    assert means.values() == expected


def test_nothing_that_is_said_of_a_row_waits_for_the_device() -> None:
    # Tensors without numbers: whatever would have to look at one fails.
    recipe = {
        "proximal": "learner",
        "corrections": [{"kind": "tis"}, {"kind": "mask"}, {"kind": "lag", "max_lag": 1}],
    }
    objective = PolicyObjective(AlgorithmSettings.model_validate(recipe), version=3)
    row: MicroBatch = longest_row(9, 30).to(torch.device("meta"))
    logprobs_N = torch.zeros_like(row.weights_N)
    _, stats = objective(row, logprobs_N, logprobs_N)
    assert {"behavior_gap_lag_3", "effective_samples_lag_3", "masked_fraction"} <= stats.keys()
    Means().add(stats)
