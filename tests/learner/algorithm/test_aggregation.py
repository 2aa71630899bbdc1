from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from learner.algorithm.aggregation import Aggregation, token_weights
from tests import reference

HOW: list[Aggregation] = ["token", "sequence", "constant"]
counts = st.lists(st.integers(0, 6), min_size=1, max_size=6)


@pytest.mark.parametrize(
    ("how", "sampled", "weights"),
    [
        ("token", [1, 3], [1 / 4, 1 / 4]),
        ("token", [2, 0], [1 / 2, 1 / 2]),
        ("sequence", [1, 3], [1 / 2, 1 / 6]),
        ("sequence", [2, 0], [1 / 4, 1 / 2]),  # an episode without a sampled token is one of two all the same
        ("constant", [1, 3], [1 / 16, 1 / 16]),
    ],
)
def test_weights_equal_the_hand_computed_ones(
    how: Aggregation, sampled: list[int], weights: list[float]
) -> None:
    assert token_weights(sampled, how, 8) == pytest.approx(weights)


@pytest.mark.parametrize("how", HOW)
@given(sampled=counts.filter(any))
def test_the_weighted_sum_is_the_papers_average(how: Aggregation, sampled: list[int]) -> None:
    rng = np.random.default_rng(sum(sampled))
    losses = [rng.normal(size=count).tolist() for count in sampled]
    total = sum(w * sum(own) for w, own in zip(token_weights(sampled, how, 5), losses, strict=True))
    assert total == pytest.approx(reference.aggregate(losses, how, 5))


@given(sampled=counts.filter(all), split=st.integers(0, 6))
def test_weights_over_all_tokens_add_up_to_one_however_they_are_split(sampled: list[int], split: int) -> None:
    for how in ("token", "sequence"):
        shares = [w * count for w, count in zip(token_weights(sampled, how), sampled, strict=True)]
        assert sum(shares[:split]) + sum(shares[split:]) == pytest.approx(1.0)


def test_no_length_is_no_constant() -> None:
    with pytest.raises(ValueError, match=r"^aggregation='constant' divides by a length[^\n]*$"):
        token_weights([1], "constant")


@pytest.mark.parametrize("how", HOW)
def test_episodes_that_sampled_nothing_weigh_nothing(how: Aggregation) -> None:
    assert all(np.isfinite(token_weights([0, 0], how, 8)))
