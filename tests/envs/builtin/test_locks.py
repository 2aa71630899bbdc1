"""Locks: who wins is what the lock, the key and the seat say, and policies are asked for the other seat's moves."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from envs.base import messages_of
from envs.builtin.locks import CHOICES, KEY_OF, KEYS, LOCKS, Locks, Player

SEEDS = range(300)


def test_every_key_opens_two_locks() -> None:
    assert Counter(KEY_OF.values()) == dict.fromkeys(("red", "green", "blue", "white", "black", "yellow"), 2)
    assert (KEY_OF["iron"], KEY_OF["copper"], KEY_OF["zinc"], KEY_OF["chrome"]) == (
        "red",
        "green",
        "red",
        "yellow",
    )


def test_a_scripted_keeper_draws_every_lock_and_never_chance() -> None:
    env = Locks("opener", instructions=False)
    seen = Counter(env.reset(seed=seed)[0] for seed in SEEDS)
    assert set(seen) == {f"opener: {lock}" for lock in LOCKS}


@pytest.mark.parametrize("lock", LOCKS)
def test_a_scripted_opener_knows_every_key(lock: str) -> None:
    env = Locks("keeper", instructions=False)
    assert env.reset(seed=1)[0] == "keeper"
    assert env.step(lock) == ("opened", 0.0, True, False, {"success": False})


def test_nobody_knows_the_key_of_chance() -> None:
    env = Locks("keeper", instructions=False)
    wins = 0.0
    for seed in SEEDS:
        env.reset(seed=seed)
        wins += env.step("chance")[1]
    assert 0.75 < wins / len(SEEDS) < 0.92  # five in six


def played(env: Locks, seed: int, words: dict[str, str]) -> tuple[list[Any], float, dict[str, Any]]:
    """A game of which both seats are played from here; the messages, the reward and the last info."""
    said = [messages_of(env.reset(seed=seed)[0])[0]]
    while True:
        seat = said[-1]["content"].split(":")[0]
        observation, reward, terminated, _, info = env.step(words[seat])
        said.append(messages_of(observation)[0])
        if terminated:
            return said, reward, info


@pytest.mark.parametrize(("seat", "asked"), [("keeper", "opener"), ("opener", "keeper")])
def test_the_other_seat_is_asked_of_a_policy(seat: Any, asked: str) -> None:
    env = Locks(seat, "policy", instructions=False)
    for key in KEYS:
        said, reward, info = played(env, 5, {"keeper": "gold", "opener": key})
        assert [each["content"] for each in said[:2]] == ["keeper", "opener: gold"]
        assert [each.get("opponent", False) for each in said[:2]] == [
            asked == "keeper",
            asked == "opener",
        ]
        won = (key == "white") == (seat == "opener")
        assert (reward, info) == (float(won), {"success": won}) and KEY_OF["gold"] == "white"


def test_an_opponents_word_that_is_none_is_replaced_and_ones_own_loses() -> None:
    env = Locks("opener", "policy", instructions=False)
    drawn = set()
    for seed in SEEDS:
        assert messages_of(env.reset(seed=seed)[0])[0]["opponent"]
        drawn.add(env.step("?")[0])
    assert drawn == {f"opener: {lock}" for lock in CHOICES}
    assert env.step("?") == ("no such word", 0.0, True, False, {"malformed": True, "success": False})


def test_a_player_errs_as_often_as_it_is_told_to() -> None:
    right = [Player(0.25, seed).act("opener: tin") == KEY_OF["tin"] for seed in range(2000)]
    assert sum(right) / 2000 == pytest.approx(0.75, abs=0.04)
    assert {Player(0.0, seed).act("keeper") for seed in SEEDS} == set(CHOICES)
