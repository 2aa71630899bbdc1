"""Twenty questions: the table distinguishes all things, and only halving finds them in time."""

from __future__ import annotations

import math
import random
from itertools import combinations
from typing import Any

import pytest

from envs.builtin.twenty_questions import (
    CANDIDATES,
    PROPERTIES,
    THINGS,
    TURNS,
    WORDS,
    Player,
    TwentyQuestions,
    paid,
    questions_needed,
)
from tests.envs.playing import played

SEEDS = range(200)


def meaning(thing: str, **options: Any) -> TwentyQuestions:
    env = TwentyQuestions(instructions=False, **options)
    env.reset(seed=0)
    env._meant = thing
    return env


def test_no_two_things_have_the_same_properties() -> None:
    assert len(THINGS) == 64
    for one, other in combinations(THINGS, 2):
        assert any((one in having) != (other in having) for having in PROPERTIES.values())


def test_the_table_does_not_contradict_itself() -> None:
    alive = PROPERTIES["alive"]
    assert PROPERTIES["a hunter"] <= alive
    assert not alive & (PROPERTIES["made of metal"] | PROPERTIES["made to carry people"])
    assert not alive & (PROPERTIES["found in most homes"] | PROPERTIES["able to make music"])
    assert not PROPERTIES["bigger than a person"] & PROPERTIES["held in one hand"]
    assert all(3 < len(having) < 32 for having in PROPERTIES.values())


def test_a_dialogue_by_hand() -> None:
    env = meaning("frog", level=2)
    assert env.step("is it alive") == ("yes", 0.0, False, False, {})
    assert env.step(" Is it ROUND\n") == ("no", 0.0, False, False, {})
    assert env.step("is it found in water")[0] == "yes"
    assert env.step("it is frog") == ("yes", 1.0, True, False, {"success": True})
    assert meaning("frog").step("it is crab") == ("no", 0.0, True, False, {"success": False})
    env = meaning("moon", max_turns=2)
    assert env.step("is it sharp")[2:4] == (False, False)
    assert env.step("is it round") == ("yes", 0.0, False, True, {"success": False})


def test_what_is_told_is_what_the_table_says() -> None:
    for thing in THINGS:
        for name, having in PROPERTIES.items():
            assert meaning(thing).step(f"is it {name}")[0] == ("yes" if thing in having else "no")


def test_of_fewer_things_every_one_is_listed_and_meant_and_no_other() -> None:
    env = TwentyQuestions(things=16, instructions=False)
    listed, meant = set(), set()
    for seed in SEEDS:
        listed |= set(env.reset(seed=seed)[0].split())
        meant.add(env.meant)
        assert played(env, Player(0.0, seed), seed).success
    assert listed == meant == set(THINGS[::4])


@pytest.mark.parametrize("level", CANDIDATES)
@pytest.mark.parametrize("instructions", [True, False])
def test_a_player_without_errors_halves_and_guesses_in_time(level: int, instructions: bool) -> None:
    env = TwentyQuestions(level, instructions=instructions)
    for seed in SEEDS:
        episode = played(env, Player(0.0, seed), seed)
        assert (episode.reward, episode.success) == (1.0, True)
        assert episode.turns <= TURNS[level]
    listed = episode.observations[0].splitlines()[-1].split()
    assert len(set(listed)) == len(listed) == CANDIDATES[level]


@pytest.mark.parametrize("level", CANDIDATES)
def test_there_is_little_more_time_than_halving_needs(level: int) -> None:
    needed = math.log2(CANDIDATES[level]) + 1
    assert needed < TURNS[level] <= needed + 2
    assert questions_needed(frozenset(THINGS)) == 8


@pytest.mark.parametrize("level", CANDIDATES)
def test_players_that_do_not_ask_well_mostly_fail(level: int) -> None:
    env = TwentyQuestions(level, instructions=False)
    anything = [played(env, Player(1.0, seed), seed).reward for seed in SEEDS]
    assert sum(anything) < 0.05 * len(SEEDS)
    at_once, in_order = 0.0, 0.0
    for seed in SEEDS:
        listed = env.reset(seed=seed)[0].split()
        at_once += env.step(f"it is {listed[0]}")[1]
        env.reset(seed=seed)
        left = set(listed)
        asked = random.Random(seed).sample(list(PROPERTIES), TURNS[level] - 1)  # any questions, all heeded
        for name in asked:
            having = PROPERTIES[name]
            left = left & having if env.step(f"is it {name}")[0] == "yes" else left - having
        in_order += env.step(f"it is {min(left)}")[1]
    assert at_once < 2 * len(SEEDS) / CANDIDATES[level]
    assert in_order < 0.75 * len(SEEDS)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "frog",
        "it is",
        "it is a frog",
        "it is frog crab",
        "it is frog\nit is crab",
        "is it frog",
        "it is alive",
        "is it alive or round",
        "is it purple",
        "is it it is frog",
        f"it is {' '.join(THINGS)}",
        " ".join(THINGS),
    ],
)
def test_what_is_neither_question_nor_guess_ends_unpaid(text: str) -> None:
    _, reward, terminated, truncated, info = meaning("frog").step(text)
    assert (reward, terminated, truncated, info) == (0.0, True, False, {"malformed": True, "success": False})


def test_the_candidates_said_back_are_never_paid() -> None:
    env = TwentyQuestions()
    for seed in SEEDS:
        observation, _ = env.reset(seed=seed)
        for text in (observation, *observation.splitlines()):
            env.reset(seed=seed)
            assert env.step(text)[1] == 0.0


def test_questions_cost_what_was_asked_for_and_never_more_than_all() -> None:
    env = meaning("frog", cost=0.1)
    env.step("is it alive")
    env.step("is it round")
    assert env.step("it is frog")[1] == pytest.approx(0.8)
    assert paid(True, 0, 0.1) == 1.0 and paid(True, 50, 0.1) == 0.0 and paid(False, 0, 0.1) == 0.0


@pytest.mark.parametrize("level", CANDIDATES)
def test_train_and_heldout_lists_never_meet_and_every_thing_is_meant_in_both(level: int) -> None:
    met: dict[str, set[str]] = {}
    meant: dict[str, set[str]] = {}
    for split in ("train", "heldout"):
        env = TwentyQuestions(level, split=split, instructions=False)
        met[split], meant[split] = set(), set()
        for seed in range(300):
            met[split].add(env.reset(seed=seed)[0])
            meant[split].add(env.meant)
    assert not met["train"] & met["heldout"]
    assert min(map(len, meant.values())) >= 58


def test_every_word_said_is_among_words() -> None:
    for level in CANDIDATES:
        env = TwentyQuestions(level, instructions=False)
        for seed in SEEDS:
            assert played(env, Player(0.5, seed), seed).words <= set(WORDS)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"level": 0}, "must be one of 1, 2, 3, 4"),
        ({"cost": 0.2}, r"cost=0.2 must lie in \[0, 0.1\]"),
        ({"level": 2, "things": 15}, "things=15 must lie between the level's candidates, 16, and 64"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        TwentyQuestions(**options)
