"""Equal is what one exact number could be behind; the truth is exact arithmetic over fractions."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout.buffer.samplers import spread
from rollout.wire.equality import all_equal
from rollout.wire.trajectory import EndReason, Group, Slot, Task, Trajectory, Turn

# Ways to earn the same (or not) in parts, as an environment says them.
EQUAL = [
    [[0.1, 0.2], [0.3]],
    [[0.1] * 10, [0.3, 0.7], [0.2] * 5, [1.0], [0.6, 0.1, 0.3], [0.9, 0.1]],
    [[0.1, 0.2, -0.3], [0.0], [1.1, -1.1]],  # nothing in all: rounding is large beside the total
    [[1e5] * 10, [3e5, 7e5]],
    [[1e-7] * 10, [3e-7, 7e-7]],
    [[-0.1, -0.2], [-0.3]],
    [[5.0], [5.0]],
]
DIFFERENT = [
    [[0.0], [1e-6]],
    [[0.3], [0.3, 1e-6]],
    [[1e6], [1e6 + 1]],
    [[1e-6], [2e-6]],
    [[1e6, -1e6], [1.0], [0.0]],  # one large episode does not make the others equal
    [[1.0], [1.0 + 2e-6]],
]


def _group(ways: list[list[float]], stored: bool) -> Group:
    task, none = Task("toy", 0), np.zeros(0, np.int32)
    episodes = tuple(
        Trajectory(
            0, 0, index, task,
            tuple(
                Turn(turn, 0, "", "", none, none, none.astype(np.float32), none,
                     float(np.float32(reward)) if stored else reward, "stop")
                for turn, reward in enumerate(rewards)
            ),
            EndReason.TERMINATED,
        )
        for index, rewards in enumerate(ways)
    )  # fmt: skip
    return Group(Slot(0, 0, task, 0), episodes)


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize(("ways", "equal"), [(w, True) for w in EQUAL] + [(w, False) for w in DIFFERENT])
def test_episodes_that_earned_the_same_in_other_parts_are_uniform(
    ways: list[list[float]], equal: bool, stored: bool
) -> None:
    assert _group(ways, stored).equal_rewards == equal


@given(
    st.lists(st.integers(1, 1000), min_size=1, max_size=30),
    st.integers(1, 30),
    st.floats(1e-6, 1e6),
    st.integers(0, 2),
)
def test_a_total_is_equal_however_it_is_divided_and_another_total_is_not(
    parts: list[int], pieces: int, scale: float, more: int
) -> None:
    def total(rewards: list[Fraction]) -> tuple[float, float]:
        stored = [float(np.float32(float(reward))) for reward in rewards]
        return sum(stored), sum(map(abs, stored))

    unit, whole = Fraction(scale), sum(parts)
    one, size = total([part * unit for part in parts])
    other, other_size = total([Fraction(whole + more, pieces) * unit] * pieces)
    # The least difference, one of at most 30,000 units, is forty times what float32 leaves open.
    assert all_equal([one, other], [size, other_size]) == (more == 0)


def test_nothing_is_equal_and_what_is_no_number_is_not() -> None:
    assert all_equal([]) and all_equal([3.0])
    assert not all_equal([float("nan")]) and not all_equal([1.0, float("nan")])


def test_a_group_that_earned_the_same_has_no_priority() -> None:
    assert spread([0.1 + 0.2, 0.3]) == 0.0
    assert spread([]) == 0.0
