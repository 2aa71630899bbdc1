"""Sokoban against boards played by hand and a breadth-first search, and attempts to game the reward."""

from __future__ import annotations

from typing import Any

import pytest

from envs.builtin.sokoban import LEVELS, MOVES, WORDS, Player, Sokoban, board_of, least_pushes, solution
from tests.envs.playing import played

SEEDS = range(200)
LAST = ("#####", "#.$@#", "#---#", "#---#", "#####")  # one move from its end


def standing(*rows: str, **options: Any) -> Sokoban:
    env = Sokoban(instructions=False, **options)
    env.reset(seed=0)
    env._board = board_of(list(rows))
    return env


def shortest(text: str) -> int:
    """Moves to solve a board, by breadth-first search over drawings; -1 where it cannot be solved."""
    edge, met, moves = [board_of(text.split("\n"))], {text}, 0
    while edge:
        if any("$" not in str(board) for board in edge):
            return moves
        after = [board.after(move) for board in edge for move in MOVES]
        edge = []
        for board in after:
            if board is not None and str(board) not in met:
                met.add(str(board))
                edge.append(board)
        moves += 1
    return -1


def test_a_board_by_hand() -> None:
    env = standing("#####", "#@--#", "#-$.#", "#.$-#", "#####")
    assert env.step("up") == ("blocked\n#####\n#@--#\n#-$.#\n#.$-#\n#####", 0.0, False, False, {})
    assert env.step("down")[0] == "#####\n#---#\n#@$.#\n#.$-#\n#####"
    assert env.step(" Right\n")[0] == "#####\n#---#\n#-@*#\n#.$-#\n#####"
    assert env.step("right")[0] == "blocked\n#####\n#---#\n#-@*#\n#.$-#\n#####", (
        "there is a wall behind the box"
    )
    assert env.step("down")[0] == "blocked\n#####\n#---#\n#-@*#\n#.$-#\n#####"
    for move in ("left", "down"):
        env.step(move)
    assert env.board == board_of(["#####", "#---#", "#--*#", "#+$-#", "#####"])
    assert env.step("right")[0] == "#####\n#---#\n#--*#\n#.@$#\n#####"
    env = standing(*LAST)
    assert env.step("left") == ("#####\n#*@-#\n#---#\n#---#\n#####", 1.0, True, False, {"success": True})


def test_two_boxes_in_a_row_do_not_move() -> None:
    env = standing("######", "#@$$.#", "#.---#", "#----#", "#----#", "######")
    assert env.step("right")[0] == "blocked\n######\n#@$$.#\n#.---#\n#----#\n#----#\n######"


def test_turns_run_out_as_truncation() -> None:
    env = standing(*LAST, max_turns=2)
    assert env.step("right")[2:] == (False, False, {})
    assert env.step("up")[1:] == (0.0, False, True, {"success": False})
    assert standing(*LAST, max_turns=1).step("left")[1:4] == (1.0, True, False)


@pytest.mark.parametrize(
    "level", [1, 2, 3, pytest.param(4, marks=pytest.mark.slow), pytest.param(5, marks=pytest.mark.slow)]
)
def test_a_player_without_errors_solves_every_board(level: int) -> None:
    env = Sokoban(level, instructions=level % 2 == 0)
    for seed in SEEDS[: 100 if level == 5 else None]:
        episode = played(env, Player(0.0, seed), seed)
        assert (episode.reward, episode.success) == (1.0, True)
        assert episode.turns < 0.7 * LEVELS[level].max_turns
        assert not any(observation.startswith("blocked") for observation in episode.observations)


@pytest.mark.parametrize("level", [1, 2, 3])
def test_a_solution_has_the_fewest_moves(level: int) -> None:
    env = Sokoban(level, instructions=False)
    for seed in range(10):
        text, _ = env.reset(seed=seed)
        assert len(solution(text)) == shortest(text) >= least_pushes(env.board) >= LEVELS[level].pushes.start


def test_a_board_that_cannot_be_solved_has_no_solution() -> None:
    cornered = "#####\n#$--#\n#-@.#\n#---#\n#####"
    blocking = "######\n#-$$-#\n#-@..#\n#----#\n#----#\n######"  # side by side against the wall
    assert shortest(cornered) == shortest(blocking) == -1
    assert solution(cornered) == solution(blocking) == ()
    player = Player(0.0, 0)
    assert {player.act(blocking) for _ in range(100)} == set(MOVES), "it moves on, at random"


@pytest.mark.parametrize("level", [1, 2, 3])
def test_random_moves_seldom_solve_a_board(level: int) -> None:
    solved = sum(played(Sokoban(level), Player(1.0, seed), seed).reward for seed in SEEDS)
    assert solved < (0.4 if level == 1 else 0.1) * len(SEEDS)


def test_an_erring_player_solves_some_boards() -> None:
    rewards = [played(Sokoban(2), Player(0.3, seed), seed).reward for seed in SEEDS]
    assert 0.3 * len(SEEDS) < sum(rewards) < len(SEEDS)


@pytest.mark.parametrize("level", LEVELS)
def test_boards_are_what_their_level_says(level: int) -> None:
    kind, env = LEVELS[level], Sokoban(level, instructions=False)
    for seed in range(30):
        rows = env.reset(seed=seed)[0].split("\n")
        assert len(rows) == kind.size and {len(row) for row in rows} == {kind.size}
        assert set(rows[0] + rows[-1]) == {"#"} and {row[0] + row[-1] for row in rows} == {"##"}
        text = "".join(rows)
        assert (text.count("$"), text.count("@") + text.count("+")) == (kind.boxes, 1)
        assert text.count(".") + text.count("+") == kind.boxes
        assert least_pushes(env.board) in kind.pushes
        assert str(board_of(rows)) == "\n".join(rows)


@pytest.mark.parametrize(
    "text", ["", "jump", "up down", "up\nup", "left,right", "u", "upwards", " ".join(MOVES)]
)
def test_what_is_no_direction_ends_unpaid(text: str) -> None:
    env = Sokoban()
    env.reset(seed=0)
    assert env.step(text)[1:] == (0.0, True, False, {"malformed": True, "success": False})


def test_the_board_said_back_is_never_paid() -> None:
    env = Sokoban()
    for seed in range(20):
        observation, _ = env.reset(seed=seed)
        assert env.step(observation)[1] == 0.0


@pytest.mark.parametrize("level", LEVELS)
def test_train_and_heldout_boards_never_meet(level: int) -> None:
    seeds = range(100 if level < 4 else 15)
    drawn = []
    for split in ("train", "heldout"):
        env = Sokoban(level, split=split, instructions=False)
        drawn.append({env.reset(seed=seed)[0] for seed in seeds})
    assert not drawn[0] & drawn[1]
    assert all(len(boards) > 0.5 * len(seeds) for boards in drawn)


def test_every_word_said_is_among_words() -> None:
    for level in (1, 2, 3):
        env = Sokoban(level, instructions=False)
        for seed in range(50):
            assert played(env, Player(0.5, seed), seed).words <= set(WORDS)


def test_wrong_options_are_refused() -> None:
    with pytest.raises(ValueError, match="level=6 must be one of 1, 2, 3, 4, 5"):
        Sokoban(level=6)
