from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from learner.algorithm.advantages import group_normalized


def test_group_normalized_equals_a_hand_computed_case() -> None:
    # mean 1, population variance (1 + 1 + 1 + 9) / 4 = 3
    expected = np.array([-1, -1, -1, 3]) / (np.sqrt(3.0) + 0.5)
    advantages = group_normalized([0.0, 0.0, 0.0, 4.0], eps=0.5)
    assert advantages.dtype == np.float32
    np.testing.assert_allclose(advantages, expected, rtol=1e-6)


@given(st.floats(-1e6, 1e6, width=32), st.integers(2, 16))
def test_equal_rewards_give_exact_zeros(reward: float, size: int) -> None:
    assert not group_normalized([reward] * size).any()


@given(st.lists(st.integers(-5, 5), min_size=2, max_size=8), st.integers(-100, 100))
def test_advantages_ignore_a_shift_of_all_rewards(rewards: list[int], shift: int) -> None:
    moved = [r + shift for r in rewards]
    np.testing.assert_allclose(group_normalized(rewards), group_normalized(moved), atol=1e-5)


@pytest.mark.parametrize("rewards", [[], [1.0], [0.0, float("nan")]])
def test_rewards_without_a_baseline_are_refused(rewards: list[float]) -> None:
    with pytest.raises(ValueError, match=r"at least 2|finite"):
        group_normalized(rewards)
