"""FrozenLake in words against Gymnasium's own lake, and the split of its maps."""

from __future__ import annotations

import numpy as np
import pytest
from gymnasium.envs.toy_text.frozen_lake import is_valid

from envs.base import held_out
from envs.builtin.frozen_lake import ACTIONS, FrozenLake, Player, distances

SEEDS = range(1000)


def opened(seed: int, **options: object) -> tuple[FrozenLake, str]:
    env = FrozenLake(instructions=False, **options)
    return env, env.reset(seed=seed)[0]


def test_the_text_is_the_map_that_gymnasium_plays_on() -> None:
    for seed in SEEDS:
        env, observation = opened(seed)
        drawn = ["".join(cell.decode() for cell in row) for row in env._lake.desc]
        assert observation.splitlines()[:-1] == drawn
        assert is_valid([list(row) for row in drawn], 4), "every map can be crossed"


def test_what_is_seen_around_the_player_is_what_lies_there() -> None:
    lake = ["SFH", "HFF", "FFG"]
    env, _ = opened(0, size=3)
    env._drawn, env._lake = tuple(lake), type(env._lake)(desc=lake, is_slippery=False)
    env._lake.reset(seed=0)
    assert env.step("right")[0] == "0,1 SFH-"
    assert env.step("down")[0] == "1,1 HFFF"
    assert env.step("up")[0] == "0,1 SFH-"
    observation, reward, terminated, truncated, info = env.step("right")
    assert (observation, reward, terminated, truncated, info) == (
        "0,2 FF--",
        0.0,
        True,
        False,
        {"success": False},
    )


def test_train_and_heldout_maps_never_meet() -> None:
    train = {opened(seed, split="train")[0].map for seed in SEEDS}
    heldout = {opened(seed, split="heldout")[0].map for seed in SEEDS}
    assert not train & heldout
    assert not any(held_out("\n".join(each)) for each in train)
    assert all(held_out("\n".join(each)) for each in heldout)


@pytest.mark.parametrize("instructions", [True, False])
@pytest.mark.parametrize(("size", "view"), [(4, "neighbours"), (6, "neighbours"), (4, "map"), (6, "map")])
def test_a_player_without_errors_takes_a_shortest_path(size: int, view: str, instructions: bool) -> None:
    env = FrozenLake(size=size, view=view, max_turns=40, instructions=instructions)
    for seed in range(150):
        observation, _ = env.reset(seed=seed)
        player, done, turns = Player(0.0, seed), False, 0
        shortest = distances(env.map)[0, 0]
        while not done:
            observation, reward, terminated, truncated, info = env.step(player.act(observation))
            done, turns = terminated or truncated, turns + 1
        assert (reward, info["success"], turns) == (1.0, True, shortest)


def test_distances_are_those_of_a_relaxation() -> None:
    for seed in range(100):
        drawn = opened(seed)[0].map
        blocked = np.array([[cell == "H" for cell in row] for row in drawn])
        expected = np.full((4, 4), np.inf)
        expected[3, 3] = 0
        for _ in range(16):
            padded = np.pad(expected, 1, constant_values=np.inf)
            nearest = np.minimum.reduce(
                [padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]]
            )
            expected = np.where(blocked, np.inf, np.minimum(expected, nearest + 1))
        np.testing.assert_array_equal(distances(drawn), np.where(np.isinf(expected), -1, expected))


def test_an_erring_player_errs_as_often_as_asked() -> None:
    _, observation = opened(3)
    best = {Player(0.0, seed).act(observation) for seed in range(50)}
    moves = [Player(0.6, seed).act(observation) for seed in range(2000)]
    wrong = np.mean([move not in best for move in moves])
    assert wrong == pytest.approx(0.6 * (len(ACTIONS) - len(best)) / len(ACTIONS), abs=0.04)


def test_slipping_is_the_seeds_own_stream_and_leaves_the_map_alone() -> None:
    walked = set()
    for seed in range(50):
        first, second = opened(seed, slippery=True)[0], opened(seed, slippery=True)[0]
        assert first.map == second.map == opened(seed)[0].map
        moves = [first.step("right")[0] for _ in range(3)]
        assert moves == [second.step("right")[0] for _ in range(3)]
        walked.add(tuple(move.split(" ")[0] for move in moves))
    assert len(walked) > 3, "seeds slip differently"


def test_turns_run_out_as_truncation() -> None:
    env, _ = opened(0, max_turns=2)
    assert env.step("up")[2:4] == (False, False)
    assert env.step(" UP\n")[2:4] == (False, True)


def test_the_map_view_moves_the_p_and_the_rules_say_so() -> None:
    env = FrozenLake(view="map")
    rules, *rows = env.reset(seed=0)[0].splitlines()
    assert "You are at P" in rules and "row,column" not in rules
    assert rows == ["P" + env.map[0][1:], *env.map[1:]]
    assert "row,column" in FrozenLake().reset(seed=0)[0]


@pytest.mark.parametrize("options", [{"size": 2, "split": "heldout"}, {"frozen_probability": 1e-6}])
def test_options_that_leave_no_map_are_refused_when_made(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="none of"):
        FrozenLake(**options)
