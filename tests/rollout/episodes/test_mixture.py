"""Several environments have their shares of the groups at any time, and each its own stream of tasks without gaps."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout.episodes.mixture import Interleaving, TaskMixture
from rollout.episodes.tasks import TaskStream

shares = st.lists(
    st.one_of(st.integers(1, 12), st.decimals("0.01", "3", places=2).map(float)), min_size=1, max_size=6
)


@given(shares, st.integers(0, 400))
def test_no_environment_is_ever_a_whole_group_ahead_or_behind(given_shares: list[float], slots: int) -> None:
    interleaving, total = Interleaving(given_shares), sum(Fraction(str(share)) for share in given_shares)
    counts = [0] * len(given_shares)
    for slot in range(slots):
        place, count = interleaving.at(slot)
        assert count == counts[place], "a stream is asked for 0, 1, 2, ..."
        counts[place] += 1
        for share, had in zip(given_shares, counts, strict=True):
            assert abs(had - (slot + 1) * Fraction(str(share)) / total) < 1


@given(shares, st.integers(0, 10**9))
def test_a_slot_needs_none_of_those_before_it(given_shares: list[float], slot: int) -> None:
    slot %= 500 * len(given_shares)
    walked = Interleaving(given_shares)
    for before in range(slot):
        walked.at(before)
    assert Interleaving(given_shares).at(slot) == walked.at(slot)


def test_two_to_one_is_written_out() -> None:
    # Due: the heavy one's first group before slot 2, its second before 3; the light one's before 3, listed later.
    assert [Interleaving([2, 1]).at(slot)[0] for slot in range(6)] == [0, 0, 1, 0, 0, 1]
    assert Interleaving([2, 1]).at(3 * 10**12 + 2) == (1, 10**12), "far ahead, at once"


def test_a_single_environment_plays_its_stream_as_it_is() -> None:
    stream = TaskStream("frozen_lake", {"size": 3}, seed=5)
    assert [TaskMixture([stream], [1.0])(group) for group in range(20)] == [
        stream(group) for group in range(20)
    ]


def test_a_list_of_tasks_is_played_whole_before_any_is_played_again() -> None:
    listed = TaskStream("dataset", seed=3, count=10)
    mixture = TaskMixture([TaskStream("frozen_lake"), listed], [2, 1])
    played = [task.seed % 10 for task in map(mixture, range(60)) if task.env_id == "dataset"]
    assert sorted(played[:10]) == sorted(played[10:]) == list(range(10))


@pytest.mark.parametrize("wrong", [[], [1, 0], [1, -2], [float("inf")], [float("nan"), 1]])
def test_other_shares_are_refused(wrong: list[float]) -> None:
    with pytest.raises(ValueError, match="must be positive numbers"):
        Interleaving(wrong)
