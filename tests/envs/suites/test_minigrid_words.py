"""MiniGrid and BabyAI in words, against the package's grid of objects and its bot. Needs the extra minigrid."""

from __future__ import annotations

import re
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

pytest.importorskip("minigrid")

from minigrid.core.actions import Actions
from minigrid.utils.baby_ai_bot import BabyAIBot

from envs import registry
from envs.checks.check import check
from envs.registry import EnvironmentUnknown
from envs.suites.minigrid_words import WORDS, place, runs

LEVELS = ["BabyAI-GoToLocal-v0", "BabyAI-Open-v0", "BabyAI-BossLevel-v0", "MiniGrid-DoorKey-6x6-v0"]
CROSSING, OBSTACLES = "MiniGrid-LavaCrossingS9N2-v0", "MiniGrid-Dynamic-Obstacles-5x5-v0"


def cells(line: str) -> set[tuple[int, int]]:
    """The cells, (right, ahead), that a line's words for a place stand for."""
    where = line.partition(": ")[2]
    ahead = re.search(r"(?:(\d+) to )?(\d+) ahead", where)
    near, far = (int(ahead[1] or ahead[2]), int(ahead[2])) if ahead else (0, 0)
    if both := re.search(r"(\d+) left to (\d+) right", where):
        west, east = -int(both[1]), int(both[2])
    elif side := re.search(r"(?:(\d+) to )?(\d+) (left|right)", where):
        ends = sorted((int(side[1] or side[2]), int(side[2])))
        west, east = ends if side[3] == "right" else (-ends[1], -ends[0])
    else:
        west = east = 0
    return {(right, ahead) for right in range(west, east + 1) for ahead in range(near, far + 1)}


def standing(env: Any) -> dict[tuple[int, int], str]:
    """What the package's own objects are, in the cells it says are visible; the player's own left out."""
    grid, visible = env.unwrapped.gen_obs_grid()
    found = {}
    for column in range(grid.width):
        for row in range(grid.height):
            thing, where = grid.get(column, row), (column - grid.width // 2, grid.height - 1 - row)
            if not visible[column, row] or thing is None or where == (0, 0):
                continue
            said = {"wall": "wall", "lava": "lava"}.get(thing.type, f"{thing.color} {thing.type}")
            if thing.type == "door":
                said = f"{'locked' if thing.is_locked else 'open' if thing.is_open else 'closed'} {said}"
            found[where] = said
    return found


@pytest.mark.parametrize("env_id", [*LEVELS, CROSSING, "MiniGrid-Playground-v0"])
def test_what_is_told_is_what_stands_in_view_each_cell_once(env_id: str) -> None:
    env = registry.make(env_id, instructions=False)
    rng = np.random.default_rng(0)
    for seed in range(3):
        observation, done = env.reset(seed=seed)[0], False
        for _ in range(40):
            task, facing, *lines = observation.splitlines()
            told = [(cell, line.partition(": ")[0]) for line in lines for cell in cells(line)]
            assert len(dict(told)) == len(told) and dict(told) == standing(env)
            held = env.unwrapped.carrying
            assert task == f"task: {env.unwrapped.mission}"
            assert facing.endswith(f"carrying {f'{held.color} {held.type}' if held else 'nothing'}")
            if done:
                break
            action = rng.choice(
                [action.name for action in Actions], p=[0.1, 0.1, 0.4, 0.15, 0.05, 0.15, 0.05]
            )
            observation, _, terminated, truncated, _ = env.step(str(action))
            done = terminated or truncated


@pytest.mark.parametrize(
    ("first", "last", "words"),
    [
        ((0, 1), (0, 1), "1 ahead"),
        ((-2, 0), (-2, 0), "2 left"),
        ((3, 4), (3, 4), "4 ahead, 3 right"),
        ((-3, 6), (2, 6), "6 ahead, 3 left to 2 right"),
        ((-3, 2), (-1, 2), "2 ahead, 1 to 3 left"),
        ((-2, 2), (0, 2), "2 ahead, 0 to 2 left"),
        ((0, 2), (2, 2), "2 ahead, 0 to 2 right"),
        ((1, 0), (1, 5), "0 to 5 ahead, 1 right"),
        ((0, 1), (0, 3), "1 to 3 ahead"),
    ],
)
def test_places_by_hand(first: tuple[int, int], last: tuple[int, int], words: str) -> None:
    assert place(first, last) == words


def test_walls_are_told_in_as_few_lines_as_a_room_has_sides() -> None:
    room = {(side, ahead) for side in range(-3, 4) for ahead in range(5) if abs(side) == 3 or ahead == 4}
    assert runs(room) == [((-3, 4), (3, 4)), ((-3, 0), (-3, 3)), ((3, 0), (3, 3))]


@pytest.mark.parametrize("env_id", ["BabyAI-GoToLocal-v0", "BabyAI-PickupLoc-v0", "BabyAI-UnlockPickup-v0"])
def test_the_packages_own_bot_solves_in_words_what_it_solves_without(env_id: str) -> None:
    env, plain = registry.make(env_id), gym.make(env_id)
    for seed in range(3):
        env.reset(seed=seed)
        plain.reset(seed=seed)
        bot, action, told = BabyAIBot(env.unwrapped), None, None
        while told is None or not (told[2] or told[3]):
            action = bot.replan(action)
            told = env.step(Actions(action).name)
            _, reward, terminated, truncated, _ = plain.step(action)
            assert told[1:4] == (reward, terminated, truncated)
        assert told[1] > 0 and told[4] == {"success": True}


def test_a_last_step_that_solves_is_terminated_and_not_truncated() -> None:
    env = registry.make("MiniGrid-Empty-5x5-v0", max_steps=5)
    env.reset(seed=0)
    steps = [env.step(action) for action in ("forward", "forward", "right", "forward", "forward")]
    assert [step[2:4] for step in steps] == [(False, False)] * 4 + [(True, False)]
    assert steps[-1][1] == pytest.approx(0.1) and steps[-1][4] == {"success": True}
    env = registry.make("MiniGrid-Empty-5x5-v0", max_steps=2)
    env.reset(seed=0)
    assert [env.step("left")[3:] for _ in range(2)] == [(False, {}), (True, {"success": False})]


def test_only_the_actions_an_environment_has_can_be_said() -> None:
    env = registry.make(OBSTACLES)
    assert "Answer with one word: left, right or forward.\n" in env.reset(seed=0)[0]
    for action in ("pickup", "2", "left right", "", "the left"):
        env.reset(seed=0)
        assert env.step(action)[1:] == (0.0, True, False, {"malformed": True, "success": False})


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    env = registry.make("BabyAI-BossLevel-v0")
    for seed in range(6):
        env.reset(seed=seed)
    assert capfd.readouterr().out == ""


def test_every_word_said_is_among_words() -> None:
    said = set()
    for env_id in (*LEVELS, CROSSING, OBSTACLES, "MiniGrid-MultiRoom-N2-S4-v0", "MiniGrid-Fetch-5x5-N2-v0"):
        for seed in range(3):
            text = registry.make(env_id, instructions=False).reset(seed=seed)[0]
            said |= set(re.findall("(?<![A-Za-z])[a-z]{2,}(?![A-Za-z])", text))
    assert said <= set(WORDS) == set(registry.words(LEVELS[0]))


@pytest.mark.parametrize("env_id", [*LEVELS, OBSTACLES])
def test_it_keeps_what_environments_promise(env_id: str) -> None:
    assert check(env_id, turns=15, seconds=60) == []


def test_a_wrong_id_or_option_is_refused_in_one_line() -> None:
    for wanted, options, says in (
        ("BabyAI-GoToLocl-v0", {}, "did you mean BabyAI-GoToLocal"),
        ("MiniGrid-Empty-5x5-v0", {"sise": 4}, "its options: size"),
    ):
        with pytest.raises(EnvironmentUnknown, match=says) as refused:
            registry.make(wanted, **options)
        assert "\n" not in str(refused.value)
