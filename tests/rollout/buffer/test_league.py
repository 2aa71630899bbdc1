"""Opponents are sampled by the paper's formula from what the ledger has, and chosen alike after a restart."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rollout.buffer.league import LeagueSettings, Matchmaking, pfsp_weights
from rollout.buffer.new_groups import Owner
from rollout.buffer.replay_store import BufferSettings, ReplayStore
from rollout.wire.policies import Opponent
from rollout.wire.schema import decode, encode
from rollout.wire.trajectory import Slot
from tests.rollout.buffer.stores import reserve, rows_of
from tests.rollout.groups import make_group, task_of

LEAGUE = LeagueSettings(every_versions=2, keep=3, power=2.0)


@pytest.mark.parametrize(
    ("rates", "power", "shares"),
    [
        # (1 - x)^2: 0.25, 0.01, 0.64 of 0.90
        ([0.5, 0.9, 0.2], 2.0, [0.2777777777777778, 0.011111111111111112, 0.7111111111111111]),
        # (1 - x): 0.5, 0.1, 0.8 of 1.4
        ([0.5, 0.9, 0.2], 1.0, [0.35714285714285715, 0.07142857142857142, 0.5714285714285714]),
        ([0.5, 0.9, 0.2], 0.0, [1 / 3, 1 / 3, 1 / 3]),
        ([1.0, 1.0], 1.0, [0.5, 0.5]),
        ([1.0, 0.0], 3.0, [0.0, 1.0]),
    ],
)
def test_weights_are_those_of_prioritized_fictitious_self_play_by_hand(
    rates: list[float], power: float, shares: list[float]
) -> None:
    np.testing.assert_allclose(pfsp_weights(rates, power), shares, rtol=1e-12)


def test_version_0_and_the_newest_multiples_are_past_versions() -> None:
    assert [LEAGUE.past(version) for version in (0, 1, 2, 3, 5, 7, 9)] == [
        [0], [0], [0], [0, 2], [0, 2, 4], [0, 4, 6], [0, 6, 8],
    ]  # fmt: skip
    assert LEAGUE.model_copy(update={"keep": 1}).past(9) == [0]


def opened(folder: Path, league: LeagueSettings = LEAGUE, max_lag: int = 0) -> ReplayStore:
    owner = Owner("asker", league, ("asker", "solver"))
    return ReplayStore(
        folder, task_of, BufferSettings(groups_per_step=4, max_lag=max_lag), seed=3, owner=owner
    )


def step(store: ReplayStore, rewards: dict[int, list[float]]) -> list[Slot]:
    """Play the groups of a step; rewards of single groups by their place in it, of all others 0.5."""
    slots = []
    for place in range(4):
        slots.append(slot := reserve(store))
        group = make_group(slot)
        earned = rewards.get(place, [0.5, 0.5])
        siblings = [
            replace(each, turns=(replace(each.turns[0], reward=reward),))
            for each, reward in zip(group.trajectories, earned, strict=True)
        ]
        group = replace(group, trajectories=tuple(siblings))
        batch = encode(group)
        assert decode(batch).slot == slot and slot.policy == "asker"
        assert store.commit([], [(slot, batch, rows_of(group))]) == [None]
    version = store.version
    assert store.take(version) is not None
    store.checkpointed(version + 1)
    store.release(version + 1)
    return slots


def matches(store: ReplayStore, league: LeagueSettings = LEAGUE) -> Matchmaking:
    return Matchmaking(league, ("asker", "solver"), 3, store._ledger.db)


def test_win_rates_are_the_mean_rewards_against_each_version_and_one_draw(tmp_path: Path) -> None:
    store = opened(tmp_path)
    slots = step(store, {0: [1.0, 1.0], 1: [0.0, 5.0], 2: [-1.0, 0.0]})
    rewards = [2.0, 1.0, 0.0, 1.0]  # of the groups; each reward counts as one between 0 and 1
    expected = {
        opponent: (0.5 + sum(r for r, slot in zip(rewards, slots, strict=True) if slot.opponent == opponent))
        / (1 + 2 * sum(slot.opponent == opponent for slot in slots))
        for opponent in {slot.opponent for slot in slots}
    }
    assert {slot.opponent for slot in slots} == {Opponent("asker", 0), Opponent("solver", 0)}
    assert matches(store).win_rates(1) == pytest.approx(expected)
    assert matches(store).win_rates(0) == {}, "of steps before version 0 there is nothing"
    last = slots[-1].opponent
    assert last is not None
    one = matches(store, LEAGUE.model_copy(update={"window": 1})).win_rates(1)
    assert one[last] == pytest.approx((0.5 + 1.0) / 3), "the newest group alone, whole"


def test_opponents_come_in_proportion_to_their_weights(tmp_path: Path) -> None:
    store = opened(tmp_path)
    for _ in range(4):
        step(store, {0: [1.0, 1.0], 1: [1.0, 1.0]})
    matching = matches(store)
    drawn = Counter(matching.opponent(group_id, 4) for group_id in range(4000))
    rates = matching.win_rates(4)
    candidates = [Opponent(name, past) for name in ("asker", "solver") for past in (0, 2)]
    weights = [(1 - rates.get(each, 0.5)) ** 2 for each in candidates]
    for each, weight in zip(candidates, weights, strict=True):
        assert drawn[each] / 4000 == pytest.approx(weight / sum(weights), abs=0.03)
    latest = matches(store, LEAGUE.model_copy(update={"latest_share": 1.0}))
    assert {latest.opponent(group_id, 4) for group_id in range(99)} == {
        Opponent("asker", 4), Opponent("solver", 4),
    }  # fmt: skip


def test_a_restart_and_a_rollback_choose_the_same_opponents(tmp_path: Path) -> None:
    store = opened(tmp_path / "one")
    once = [step(store, {0: [1.0, 0.0], 3: [0.0, 0.0]}) for _ in range(4)]
    store.close()
    store = opened(tmp_path / "two")
    again = [step(store, {0: [1.0, 0.0], 3: [0.0, 0.0]}) for _ in range(2)]
    half = [reserve(store) for _ in range(2)]
    store.close()
    store = opened(tmp_path / "two")
    store.rollback(2, new_driver=True)
    again += [step(store, {0: [1.0, 0.0], 3: [0.0, 0.0]}) for _ in range(2)]
    assert [[(slot.group_id, slot.opponent) for slot in slots] for slots in again] == [
        [(slot.group_id, slot.opponent) for slot in slots] for slots in once
    ]
    assert [slot.opponent for slot in half] == [slot.opponent for slot in once[2][:2]]
    store.close()


def test_a_group_is_reissued_without_a_version_that_is_not_made_yet(tmp_path: Path) -> None:
    league = LEAGUE.model_copy(update={"latest_share": 1.0})
    store = opened(tmp_path, league, max_lag=1)
    step(store, {})
    lost = reserve(store)
    assert lost.opponent is not None and lost.opponent.version == 1
    store.rollback(0, new_driver=True)
    slot = reserve(store)
    assert slot.group_id == lost.group_id and slot.opponent is not None
    assert (slot.version, slot.opponent.version) == (0, 0)
    assert slot in [stored.slot for stored in store._ledger.since(0)]
    store.close()
