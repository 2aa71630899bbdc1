"""The replay buffer against its definition: P groups in order, never too old, never stuck, none lost or taken twice."""

from __future__ import annotations

from collections.abc import Collection
from itertools import combinations

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from rollout.buffer.scheduler import StalenessScheduler

SIZES = st.tuples(st.integers(1, 3), st.integers(0, 3))


class Driven:
    """A buffer driven by drawn choices, beside the plainest record of what must be so."""

    def __init__(self, groups_per_step: int, max_lag: int) -> None:
        self.buffer: StalenessScheduler[str] = StalenessScheduler(groups_per_step, max_lag)
        self.playing: dict[int, int] = {}  # group id -> version at issue
        self.complete: dict[int, int] = {}
        self.in_steps: list[list[int]] = []  # the step whose weights engines are given, and one ahead of it
        self.trained: list[int] = []
        self.dropped: list[int] = []
        self.next_id = 0

    @property
    def held(self) -> int:
        return len(self.playing) + len(self.complete) + sum(map(len, self.in_steps))

    @property
    def learner(self) -> int:
        """The version that the next step begins with."""
        return self.buffer.version + len(self.in_steps)

    def reserve(self) -> None:
        buffer = self.buffer
        free = self.held < (buffer.max_lag + 1) * buffer.groups_per_step
        assert buffer.reserve(self.next_id) == free
        if free:
            self.playing[self.next_id] = buffer.version
            self.next_id += 1

    def add(self, group_id: int) -> None:
        self.complete[group_id] = self.playing.pop(group_id)
        self.buffer.add(group_id, f"payload {group_id}")

    def drop(self, group_id: int) -> None:
        del self.playing[group_id]
        self.buffer.drop(group_id)
        self.dropped.append(group_id)

    def take(self) -> bool:
        buffer, version = self.buffer, self.learner
        taken = buffer.take(version)
        if taken is None:
            if len(self.in_steps) < 2:
                possible = combinations(self.complete, buffer.groups_per_step)
                assert not any(map(self.nobody_comes_late_after, possible)), "take waits though it need not"
            return False
        ids = [group_id for group_id, _ in taken]
        assert len(ids) == buffer.groups_per_step
        assert ids == sorted(ids)
        assert [payload for _, payload in taken] == [f"payload {group_id}" for group_id in ids]
        for group_id in ids:
            assert version - self.complete[group_id] <= buffer.max_lag
        assert self.nobody_comes_late_after(ids)
        for group_id in ids:
            del self.complete[group_id]
        self.in_steps.append(ids)
        assert buffer.taken(version) == taken and buffer.choose(version) is None
        return True

    def nobody_comes_late_after(self, step: Collection[int]) -> bool:
        """The definition: for every j >= 1, at most j*P of those left have a deadline within j steps."""
        buffer, version = self.buffer, self.learner
        left = [issued for group_id, issued in (self.playing | self.complete).items() if group_id not in step]
        return all(
            sum(issued + buffer.max_lag - version <= j for issued in left) <= j * buffer.groups_per_step
            for j in range(buffer.max_lag + 1)
        )

    def release(self) -> None:
        self.buffer.release(self.buffer.version + 1)
        self.trained += self.in_steps.pop(0)

    def check(self) -> None:
        buffer = self.buffer
        assert buffer.outstanding == self.held <= buffer.capacity
        assert buffer.complete == len(self.complete)
        taken = [group_id for step in self.in_steps for group_id in step]
        everywhere = [*self.playing, *self.complete, *taken, *self.trained, *self.dropped]
        assert sorted(everywhere) == list(range(self.next_id))


@settings(max_examples=150)
@given(SIZES, st.data())
def test_any_order_of_calls_keeps_every_promise(sizes: tuple[int, int], data: st.DataObject) -> None:
    driven = Driven(*sizes)
    for _ in range(data.draw(st.integers(0, 60))):
        actions = (
            ["reserve", "take"] + ["add", "drop"] * bool(driven.playing) + ["release"] * bool(driven.in_steps)
        )
        # Reserve and add as often as the rest together, or hardly a step would be reached.
        match data.draw(st.sampled_from([*actions, "reserve", *(["add", "add"] if driven.playing else [])])):
            case "reserve":
                driven.reserve()
            case "add":
                driven.add(data.draw(st.sampled_from(sorted(driven.playing))))
            case "drop":
                driven.drop(data.draw(st.sampled_from(sorted(driven.playing))))
            case "take":
                driven.take()
            case "release":
                driven.release()
        driven.check()
    # From any state, a few steps of plain work go through: nothing has stuck.
    for _ in range(driven.buffer.max_lag + 2):
        while driven.in_steps:
            driven.release()
        while driven.held < driven.buffer.capacity:
            driven.reserve()
        for group_id in list(driven.playing):
            driven.add(group_id)
        assert driven.take()
        driven.check()
    event(f"trained {len(driven.trained) // 10 * 10}+")


@settings(max_examples=60)
@given(st.integers(1, 5), st.randoms(use_true_random=False))
def test_without_lag_a_step_is_the_groups_issued_for_it(groups_per_step: int, order: object) -> None:
    buffer: StalenessScheduler[int] = StalenessScheduler(groups_per_step, max_lag=0)
    for version in range(3):
        ids = list(range(version * groups_per_step, (version + 1) * groups_per_step))
        assert all(buffer.reserve(group_id) for group_id in ids)
        assert not buffer.reserve(999)
        shuffled = list(ids)
        order.shuffle(shuffled)  # type: ignore[attr-defined]
        for group_id in shuffled:
            assert buffer.take(buffer.version) is None
            buffer.add(group_id, -group_id)
        assert buffer.take(buffer.version) == [(group_id, -group_id) for group_id in ids]
        buffer.release(version + 1)


def test_a_step_goes_on_without_a_straggler_until_its_deadline() -> None:
    buffer: StalenessScheduler[str] = StalenessScheduler(groups_per_step=2, max_lag=1)
    for group_id in range(4):
        buffer.reserve(group_id)
    for group_id in (3, 2):
        buffer.add(group_id, "")
    # Groups 0 and 1 may still be trained at version 1.
    assert [group_id for group_id, _ in buffer.take(buffer.version) or []] == [2, 3]
    buffer.release(1)
    for group_id in (4, 5):
        buffer.reserve(group_id)
        buffer.add(group_id, "")
    assert buffer.take(buffer.version) is None, "groups 0 and 1 would be two versions old afterwards"
    buffer.add(0, "")
    assert buffer.take(buffer.version) is None
    buffer.add(1, "")
    assert [group_id for group_id, _ in buffer.take(buffer.version) or []] == [0, 1]


def test_a_group_that_came_late_does_not_make_two_others_late() -> None:
    # Three groups are due at version 1 and a step takes two: one of them must go now.
    buffer: StalenessScheduler[str] = StalenessScheduler(groups_per_step=2, max_lag=1)
    for group_id in range(4):
        buffer.reserve(group_id)
    buffer.add(0, "")
    assert buffer.take(buffer.version) is None
    buffer.drop(1)
    buffer.reserve(4)
    buffer.add(3, "")
    assert [group_id for group_id, _ in buffer.take(buffer.version) or []] == [0, 3]


def test_a_rollback_lets_in_what_can_still_be_on_time() -> None:
    buffer: StalenessScheduler[str] = StalenessScheduler(groups_per_step=2, max_lag=1, version=5)
    # Due at version 5: two fit into this step, a third does not.
    assert [buffer.reserve(group_id, issue_version=4) for group_id in range(3)] == [True, True, False]
    assert not buffer.reserve(3, issue_version=3), "it would be two versions old"
    assert buffer.reserve(4, issue_version=5)
    assert buffer.outstanding == 3


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda b: b.reserve(0), "group 0 already holds a slot"),
        (lambda b: b.reserve(1), "group 1 already holds a slot"),
        (lambda b: b.add(1, ""), "group 1 is not waiting"),
        (lambda b: b.add(7, ""), "group 7 is not waiting"),
        (lambda b: b.drop(7), "group 7 holds no slot"),
        (lambda b: b.release(1), "does not follow"),
        (lambda b: (b.take(0), b.release(2)), "does not follow"),
        (lambda b: (b.take(0), b.drop(1)), "group 1 holds no slot"),
        (lambda b: (b.take(0), b.reserve(1)), "group 1 already holds a slot"),
        (lambda b: StalenessScheduler(0, 1), "groups_per_step=0"),
    ],
)
def test_a_call_out_of_order_is_refused(call: object, says: str) -> None:
    buffer: StalenessScheduler[str] = StalenessScheduler(groups_per_step=1, max_lag=1)
    buffer.reserve(0)
    buffer.reserve(1)
    buffer.add(1, "")
    with pytest.raises(ValueError, match=says):
        call(buffer)  # type: ignore[operator]
