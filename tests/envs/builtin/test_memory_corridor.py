"""The memory corridor: only an agent that remembers its beginning can answer at its end."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import pytest

from envs.builtin.memory_corridor import ACTIONS, LEVELS, NAMES, VALUES, WORDS, MemoryCorridor, Player

SEEDS = range(200)


def corridor(level: int, facts: dict[str, str], asked: str, passed: list[str]) -> MemoryCorridor:
    env = MemoryCorridor(level, instructions=False)
    env.reset(seed=0)
    env._facts, env._asked, env._passed = facts, asked, passed
    return env


def walked(env: MemoryCorridor, seed: int) -> list[str]:
    """Every observation from start to door."""
    observations = [env.reset(seed=seed)[0]]
    while not observations[-1].startswith("what did"):
        observations.append(env.step("walk")[0])
    return observations


def played(level: int, error_rate: float, seed: int, **options: Any) -> tuple[float, list[str]]:
    env, player, done = MemoryCorridor(level, **options), Player(error_rate, seed), False
    observations, rewards = [env.reset(seed=seed)[0]], []
    while not done:
        observation, reward, terminated, truncated, info = env.step(player.act(observations[-1]))
        observations.append(observation)
        rewards.append(reward)
        done = terminated or truncated
        assert ("success" in info) == done
    assert info["success"] == (sum(rewards) == 1.0) and len(rewards) == LEVELS[level][0] + 1
    return sum(rewards), observations


def test_a_corridor_by_hand() -> None:
    facts = {"eve": "left", "tom": "red"}
    passed = [
        "a lamp marked red",
        "a vase marked two",
        "a bench marked up",
        "a lamp marked two",
        "a crate marked left",
    ]
    env = corridor(2, facts, "tom", passed)
    assert env.step("red")[0] == "nothing happens\neve chose left\ntom chose red"
    said = [env.step("walk")[0] for _ in range(3)]
    assert env.step("left") == ("nothing happens\na bench marked up", 0.0, False, False, {})
    said += [env.step(" Walk\n")[0] for _ in range(3)]
    assert said == [*passed, "what did tom choose"]
    assert env.step("walk")[0] == "nothing happens\nwhat did tom choose"
    assert env.step("RED") == ("the door opens", 1.0, True, False, {"success": True})


def test_a_fact_about_another_is_no_answer() -> None:
    env = corridor(2, {"eve": "left", "tom": "red"}, "tom", ["a lamp marked red"] * 5)
    for _ in range(6):
        env.step("walk")
    assert env.step("left") == ("the door stays shut", 0.0, True, False, {"success": False})


@pytest.mark.parametrize("level", LEVELS)
def test_who_remembers_answers_and_who_guesses_does_not(level: int) -> None:
    for split in ("train", "heldout"):
        assert all(played(level, 0.0, seed, split=split)[0] == 1.0 for seed in SEEDS)
    assert sum(played(level, 1.0, seed)[0] for seed in SEEDS) <= 0.15 * len(SEEDS)


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_the_question_alone_tells_nothing_of_the_answer(split: str) -> None:
    env = MemoryCorridor(2, split=split)
    answers: Counter[tuple[str, str]] = Counter()
    seeds = range(3000)
    for seed in seeds:
        env.reset(seed=seed)
        answers[env._asked, env._facts[env._asked]] += 1
    best = sum(max(answers[asked, value] for value in VALUES) for asked in NAMES)
    assert best / len(seeds) == pytest.approx(1 / len(VALUES), abs=0.03), "the best guess there is"


@pytest.mark.parametrize("level", LEVELS)
def test_nothing_after_the_start_depends_on_the_facts(level: int) -> None:
    env = MemoryCorridor(level, instructions=False)
    for seed in range(20):
        seen = walked(env, seed)
        others = dict(zip(env._facts, reversed(VALUES), strict=False))
        other = corridor(level, others, env._asked, env._passed)
        assert [other.step("walk")[0] for _ in seen[1:]] == seen[1:]


def test_train_and_heldout_corridors_never_meet() -> None:
    for level in LEVELS:
        train, heldout = (
            {"\n".join(walked(MemoryCorridor(level, split=split), seed)[1:-1]) for seed in SEEDS}
            for split in ("train", "heldout")
        )
        assert not train & heldout
        assert len(heldout) > 0.9 * len(SEEDS), "there are enough of them"


def test_every_answer_at_once_is_no_answer() -> None:
    env = MemoryCorridor(1, instructions=False)
    seen = walked(env, 0)
    for action in ("", " ".join(VALUES), "\n".join(VALUES), *seen, f"walk {env._facts[env._asked]}"):
        walked(env, 0)
        _, reward, terminated, truncated, info = env.step(action)
        assert (reward, terminated, truncated, info) == (
            0.0,
            True,
            False,
            {"malformed": True, "success": False},
        )


@pytest.mark.parametrize("level", LEVELS)
def test_every_word_is_in_the_list(level: int) -> None:
    assert set(ACTIONS) <= set(WORDS) and all(re.fullmatch("[a-z]+", word) for word in WORDS)
    for seed in SEEDS:
        for observation in played(level, 0.5, seed, instructions=False)[1]:
            assert set(observation.split()) <= set(WORDS)


def test_turns_run_out_as_truncation() -> None:
    env = MemoryCorridor(1, max_turns=4)
    env.reset(seed=0)
    assert [env.step("red")[2:] for _ in range(4)] == [(False, False, {})] * 3 + [
        (False, True, {"success": False})
    ]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"level": 5}, "level=5 must be one of 1, 2, 3, 4"),
        ({"level": 2, "max_turns": 6}, "use 7 or more"),
        ({"split": "test"}, "must be all"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        MemoryCorridor(**options)
