"""Reuse in the store, example by example: what it chooses, what it keeps on disk, what it does where that is gone."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from rollout.buffer.replay_store import ReplayStore
from rollout.buffer.samplers import Prioritized
from rollout.buffer.segments import read_rows, segment_files
from rollout.buffer.settings import BufferSettings, ReuseSettings
from rollout.wire.partition import Partition, StepTorn
from rollout.wire.schema import decode, encode
from rollout.wire.trajectory import DropReason, EndReason, Group, Trajectory
from tests.rollout.buffer.stores import commit, group_ids, reserve

GroupOf = Callable[..., Group]
Open = Callable[..., ReplayStore]
LARGE = 50_000  # tokens: a group is 1.2 MB, and every one has a segment of its own


def reused(store: ReplayStore, version: int, share: Partition | None = None) -> list[int]:
    """Groups that a step has once more."""
    groups = [decode(batch) for batch in store.take(version, *([share] if share else [])) or []]
    assert groups, "the step is ready"
    return [group.slot.group_id for group in groups if group.reuse]


def step(store: ReplayStore, group_of: GroupOf, checkpointed: bool = True, **group: Any) -> list[int]:
    """Play what a step needs, take it and go on; what it reused."""
    version = store.version
    for _ in range(store.settings.groups_per_step):
        commit(store, group_of(reserve(store), **group))
    ids = reused(store, version)
    store.release(version + 1)
    if checkpointed:
        store.checkpointed(version + 1)
    return ids


def rows(folder: Path, query: str) -> list[tuple[Any, ...]]:
    db = sqlite3.connect(folder / "ledger.sqlite")
    found = db.execute(query).fetchall()
    db.close()
    return found


def test_the_oldest_come_first_until_they_were_reused_often_enough_or_are_too_old(
    open_store: Open, group_of: GroupOf, tmp_path: Path
) -> None:
    store = open_store(max_lag=0, reuse=ReuseSettings(groups=2, limit=2, max_lag=2))
    assert [step(store, group_of) for _ in range(5)] == [[], [0, 1], [0, 1], [2, 3], [4, 5]]
    assert rows(tmp_path, "SELECT group_id, version FROM reuses ORDER BY version, group_id") == [
        (0, 1), (1, 1), (0, 2), (1, 2), (2, 3), (3, 3), (4, 4), (5, 4),
    ]  # fmt: skip
    assert store.counts() == {
        "issued": 10, "in_flight": 0, "complete": 0, "taken": 0, "trained": 10, "dropped": 0,
    }  # fmt: skip
    store.close()


def test_a_reused_group_is_the_very_rows_and_says_which_reuse_it_is(
    open_store: Open, group_of: GroupOf
) -> None:
    store = open_store(groups_per_step=1, max_lag=0, reuse=ReuseSettings(groups=1, limit=2, max_lag=2))
    fresh = group_of(reserve(store))
    commit(store, fresh)
    seen = []
    for version in range(3):
        groups = [decode(batch) for batch in store.take(version) or []]
        seen.append([(group.slot, group.reuse) for group in groups])
        again = [str(group.trajectories) for group in groups if group.slot == fresh.slot]
        assert again == [str(decode(encode(fresh)).trajectories)]
        store.release(version + 1)
        commit(store, group_of(reserve(store)))
    assert [[reuse for _, reuse in each] for each in seen] == [[0], [0, 1], [0, 2]]
    store.close()


def with_reward(trajectory: Trajectory, reward: float) -> Trajectory:
    return replace(trajectory, turns=tuple(replace(each, reward=reward) for each in trajectory.turns))


def test_prioritized_prefers_groups_whose_trainable_episodes_earned_different_rewards(
    open_store: Open, group_of: GroupOf
) -> None:
    settings = ReuseSettings(groups=1, max_lag=1, sampler=Prioritized(exponent=10.0))
    store = open_store(groups_per_step=3, max_lag=0, max_failed_share=1.0, reuse=settings)
    ends = EndReason.TERMINATED, EndReason.TRUNCATED, EndReason.FAILED
    for earned in [(1.0, 1.0, 9.0), (0.0, 1.0, 0.5), (0.5, 0.5, 0.0)]:
        group = group_of(reserve(store), end_reasons=ends)
        episodes = [with_reward(t, reward) for t, reward in zip(group.trajectories, earned, strict=True)]
        commit(store, Group(group.slot, tuple(episodes)))
    assert reused(store, 0) == []
    store.release(1)
    for _ in range(3):
        commit(store, group_of(reserve(store)))
    assert reused(store, 1) == [1], "a failed episode's reward is no evidence"
    store.close()


def test_ranks_share_fresh_and_reused_groups_alike_by_their_tokens(
    open_store: Open, group_of: GroupOf
) -> None:
    store = open_store(max_lag=0, reuse=ReuseSettings(groups=2, max_lag=1))
    sizes = {0: 3, 1: 1, 2: 9, 3: 2}  # a group is two episodes of five tokens more: 16, 12, 28 and 14
    for version in range(2):
        for _ in range(2):
            slot = reserve(store)
            commit(store, group_of(slot, tokens=sizes[slot.group_id]))
        shares = [group_ids(store.take(version, Partition(rank, 2))) for rank in (0, 1)]
        store.release(version + 1)
    assert shares == [[2, 1], [3, 0]]
    store.close()


def test_a_step_that_was_not_finite_takes_others_and_what_it_reused_is_reused_no_more(
    open_store: Open, group_of: GroupOf, tmp_path: Path
) -> None:
    settings = ReuseSettings(groups=1, limit=3, max_lag=3)
    store = open_store(groups_per_step=1, max_lag=0, reuse=settings)
    assert [step(store, group_of) for _ in range(2)] == [[], [0]]
    commit(store, group_of(reserve(store)))
    assert reused(store, 2) == [0]
    store.discard(2, DropReason.NONFINITE)
    store.discard(2, DropReason.NONFINITE)  # the answer was lost
    (folder,) = (tmp_path / "discarded").iterdir()
    assert set(read_rows(folder).column("group_id").to_pylist()) == {2, 0}
    commit(store, group_of(reserve(store)))
    assert reused(store, 2) == [1]
    store.release(3)
    # Done again, the step before the one that was not finite has what it had, and that one chooses as it did.
    store.rollback(1)
    assert rows(tmp_path, "SELECT group_id, version, discarded FROM reuses") == [(0, 2, 1)]
    assert reused(store, 1) == [0]
    store.release(2)
    commit(store, group_of(reserve(store)))
    assert reused(store, 2) == [1]
    store.close()


def test_a_group_whose_segment_is_gone_or_damaged_is_no_candidate(
    open_store: Open, group_of: GroupOf, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {"groups_per_step": 1, "max_lag": 0, "segment_mib": 1}
    store = open_store(**settings, reuse=ReuseSettings(groups=1, limit=9, max_lag=9))
    assert [step(store, group_of, tokens=LARGE) for _ in range(3)] == [[], [0], [0]]
    paths = dict(segment_files(tmp_path / "groups"))
    paths[0].unlink()
    data = bytearray(paths[1].read_bytes())
    data[-1000] ^= 1
    paths[1].write_bytes(data)
    assert step(store, group_of, tokens=LARGE) == [2]
    assert f"{paths[1].name}: the checksum does not match" in caplog.text
    assert paths[1].with_name(paths[1].name + ".corrupt").exists()
    assert store.counts()["trained"] == 4
    # A step that is asked for again, and whose reused group was damaged meanwhile, has another one.
    commit(store, group_of(reserve(store), tokens=LARGE))
    assert reused(store, 4) == [2]
    paths[2].unlink()
    with pytest.raises(StepTorn):
        store.take(4, Partition(1, 2))
    assert reused(store, 4) == [3]
    assert rows(tmp_path, "SELECT group_id FROM reuses WHERE version = 4") == [(3,)]
    store.close()


def test_segments_are_kept_while_their_groups_may_be_reused_by_any_step_since_the_checkpoint(
    open_store: Open, group_of: GroupOf, tmp_path: Path
) -> None:
    def left() -> list[int]:
        return [number for number, _ in segment_files(tmp_path / "groups")]

    settings = {"groups_per_step": 1, "max_lag": 0, "segment_mib": 1, "disk_gib": 1 / 1024}
    store = open_store(**settings, reuse=ReuseSettings(groups=1, limit=1, max_lag=2))
    assert step(store, group_of, tokens=LARGE) == []
    assert step(store, group_of, tokens=LARGE) == [0]
    assert left() == [1], "group 0 was reused as often as it may be"
    done = [step(store, group_of, checkpointed=False, tokens=LARGE) for _ in range(3)]
    assert done == [[1], [2], [3]]
    assert left() == [1, 2, 3, 4], "a learner that goes back to version 2 reuses group 1 again"
    store.rollback(2)
    for version, ids in enumerate(done, 2):
        if version > 2:  # issued at weights that are lost: sampled anew, into the next segment
            commit(store, group_of(reserve(store), tokens=LARGE))
        assert reused(store, version) == ids
        store.release(version + 1)
    store.checkpointed(5)
    assert left() == [6]
    store.close()


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"groups": 1, "limit": 0}, "greater than or equal to 1"),
        ({"groups": -1}, "greater than or equal to 0"),
        ({"groups": 1, "max_lag": 2}, r"buffer.reuse.max_lag=2 leaves nothing to reuse: .* use 3 or more"),
        ({"groups": 9, "limit": 2}, r"buffer.reuse.groups=9 can never be found: .* use 8 or fewer"),
        ({"groups": 1, "sampler": {"kind": "newest"}}, "'fifo', 'uniform', 'prioritized'"),
        ({"groups": 1, "sampler": {"kind": "uniform", "exponent": 1.0}}, "Extra inputs"),
    ],
)
def test_what_can_not_be_is_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        BufferSettings(groups_per_step=4, max_lag=2, reuse=fields)
