"""Coloured patches: an agent that sees answers, and one that only reads has to guess."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from envs import registry
from envs.builtin.patches import COLOURS, LEVELS, PLACES, Patches, Player, picture, seen
from envs.images import decode_image

SEEDS = range(100)


def played(level: int, error_rate: float, seed: int, split: Any = "all") -> tuple[float, int]:
    env, player = Patches(level, split), Player(error_rate, seed)
    observation, _ = env.reset(seed=seed)
    for turn in range(1, 3):
        observation, reward, terminated, truncated, info = env.step(player.act(observation))
        assert ("success" in info) == terminated and not truncated
        if terminated:
            assert info["success"] == bool(reward)
            return reward, turn
    raise AssertionError("two turns are the most")


@pytest.mark.parametrize("level", LEVELS)
def test_who_sees_answers_and_who_guesses_does_not(level: int) -> None:
    for split in ("train", "heldout"):
        assert {played(level, 0.0, seed, split) for seed in SEEDS} == {(1.0, 2 if level == 3 else 1)}
    assert 0.15 * len(SEEDS) < sum(played(level, 1.0, seed)[0] for seed in SEEDS) < 0.4 * len(SEEDS)


@pytest.mark.parametrize("level", LEVELS)
def test_nothing_but_the_picture_tells_the_answer(level: int) -> None:
    env = Patches(level)
    texts = {env.reset(seed=seed)[0][0]["content"][0]["text"] for seed in SEEDS}
    assert len(texts) == 1
    assert all(
        env.reset(seed=seed)[0] == registry.make("patches", level=level).reset(seed=seed)[0]
        for seed in range(5)
    )


@pytest.mark.parametrize("colour", COLOURS)
@pytest.mark.parametrize("place", PLACES)
def test_a_patch_is_where_and_what_it_is_said_to_be(colour: str, place: str) -> None:
    pixels = picture(colour, place, np.full((16, 16, 3), 59, np.uint8))
    rows, columns = np.nonzero((pixels != 59).any(-1))
    assert (len(rows), seen(pixels)) == (64, (colour, place))
    half = {
        "top": rows.max() < 8,
        "bottom": rows.min() > 7,
        "left": columns.max() < 8,
        "right": columns.min() > 7,
    }
    assert [name for name, holds in half.items() if holds] == [place]


def test_the_second_question_is_about_the_first_picture() -> None:
    env = Patches(3)
    first = seen(decode_image(env.reset(seed=1)[0][0]["content"][1]))[0]
    observation, reward, terminated, _, info = env.step("red")
    assert (reward, terminated, info) == (0.0, False, {})
    assert observation[0]["content"][0]["text"] == "which colour before"
    assert env.step(f" {first.upper()}\n")[1] == 1.0
