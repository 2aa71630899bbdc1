"""Chess against games and positions written by hand and a search without pruning. Needs the extra chess."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

chess = pytest.importorskip("chess")

from envs.builtin.chess_game import (  # noqa: E402
    LEVELS,
    MATE,
    WORDS,
    ChessGame,
    Player,
    _worth,
    best_moves,
    board_of,
    early_position,
    moves_at_random,
    paid,
    takes_the_most,
)
from tests.envs.playing import played  # noqa: E402

START = "rnbqkbnr\npppppppp\n........\n........\n........\n........\nPPPPPPPP\nRNBQKBNR\nwhite KQkq -"


def standing(fen: str = chess.STARTING_FEN, **options: Any) -> ChessGame:
    env = ChessGame(instructions=False, **options)
    env.reset(seed=0)
    env._board = chess.Board(fen)
    env._first_side = env._board.turn
    return env


def test_the_fastest_mate_by_hand_and_to_whom_it_is_paid() -> None:
    env = standing(level=2, opponent="self")
    assert env._observed() == START
    assert env.step("f2f3")[0].endswith("PPPPP.PP\nRNBQKBNR\nblack KQkq -")
    assert env.step("e7e5")[1:] == (0.0, False, False, {"seat": 1})
    assert env.step("g2g4")[1:] == (0.0, False, False, {"seat": 0})
    board = "rnb.kbnr\npppp.ppp\n........\n....p...\n......Pq\n.....P..\nPPPPP..P\nRNBQKBNR"
    assert env.step("d8h4") == (f"{board}\ncheckmate", 0.0, True, False, {"success": False, "seat": 1}), (
        "white began"
    )
    env = standing("rnbqkbnr/pppp1ppp/8/4p3/6P1/5P2/PPPPP2P/RNBQKBNR b KQkq - 0 2", level=2)
    assert env.step("D8H4\n")[1:] == (1.0, True, False, {"success": True}), "black is the agent"


def test_alone_a_side_loses_by_what_is_no_move_and_a_game_without_an_end_is_a_draw() -> None:
    for before, reward in (([], 0.0), (["e2e4"], 1.0)):
        env = standing(level=2, opponent="self")
        for move in before:
            env.step(move)
        malformed = {"malformed": True, "success": False, "seat": len(before)}
        assert env.step("I resign.")[1:] == (reward, True, False, malformed)
    env = standing(level=2, opponent="self", max_turns=1)
    assert env.step("e2e4")[1:] == (0.5, False, True, {"success": False, "seat": 0})


def test_promotion_castling_and_en_passant_are_moves_like_others() -> None:
    env = standing("4k3/P7/8/8/8/8/8/R3K2R w KQ - 0 1", level=2, opponent="self")
    assert env.step("e1g1")[0].splitlines()[-2:] == ["R....RK.", "black - -"]
    env.step("e8e7")
    assert env.step("a7a8n")[0].splitlines()[0] == "N......."
    env = standing("4k3/8/8/8/4p3/8/3P4/4K3 w - - 0 1", level=2, opponent="self")
    assert env.step("d2d4")[0].endswith("black - d3")
    assert env.step("e4d3")[0].splitlines()[4:6] == ["........", "...p...."]


def test_a_move_that_is_not_legal_is_answered_and_costs_a_turn() -> None:
    env = standing(level=2, max_turns=2, legal=True)
    observation, reward, terminated, truncated, info = env.step("e2e5")
    assert observation.startswith(f"illegal\n{START}\nlegal ")
    assert sorted(observation.splitlines()[-1].split()[1:]) == sorted(
        [f"{file}2{file}{rank}" for file in "abcdefgh" for rank in "34"] + ["b1a3", "b1c3", "g1f3", "g1h3"]
    )
    assert (reward, terminated, truncated, info) == (0.0, False, False, {})
    assert env.step("e1e1")[1:] == (0.0, False, True, {"success": False})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "e4",
        "Nf3",
        "0000",
        "e2e4 d2d4",
        "e2e4\nd2d4",
        "e2-e4",
        "i2i4",
        "e7e8k",
        "e2e4e",
        "legal e2e4",
        START,
    ],
)
def test_what_is_no_move_in_uci_ends_unpaid(text: str) -> None:
    for level in (1, 2):
        step = standing(level=level).step(text)
        assert step[1:] == (0.0, True, False, {"malformed": True, "success": False})


def test_draws_pay_half_in_a_game_and_nothing_in_a_puzzle() -> None:
    stalemate = "7k/8/8/6Q1/8/8/8/K7 w - - 0 1"
    told, reward, terminated, _, info = standing(stalemate, level=2).step("g5g6")
    assert (told.splitlines()[-1], reward, terminated, info) == ("stalemate", 0.5, True, {"success": False})
    assert standing(stalemate, level=1).step("g5g6")[1] == 0.0
    assert standing("7k/8/8/8/8/8/1q6/K7 w - - 0 1", level=2).step("a1b2")[:2] == (
        "\n".join([".......k", *["........"] * 5, ".K......", "........", "insufficient material"]),
        0.5,
    )
    assert (paid(True, False, True), paid(False, False, False)) == (1.0, 0.0)


def test_a_puzzle_is_over_with_one_legal_move() -> None:
    env = standing("7k/8/6K1/8/8/8/8/Q7 w - - 0 1")
    assert env.step("a1a9")[4]["malformed"]
    env = standing("7k/8/6K1/8/8/8/8/Q7 w - - 0 1")
    assert env.step("g6g8")[0].startswith("illegal\n")
    told, *rest = env.step("a1b1")
    assert (told.splitlines()[-1], rest) == ("no mate", [0.0, True, False, {"success": False}])
    assert standing("7k/8/6K1/8/8/8/8/Q7 w - - 0 1").step("a1a8")[1] == 1.0


def test_what_is_shown_is_enough_to_go_on_from() -> None:
    rng = np.random.default_rng(0)
    for seed in range(30):
        env = ChessGame(level=2, legal=seed % 2 == 0, instructions=seed % 3 == 0)
        observation, _ = env.reset(seed=seed)
        for _ in range(10):
            assert board_of(observation).epd() == env.board.epd()
            observation, _, terminated, _, _ = env.step(moves_at_random(env.board, rng).uci())
            if terminated:
                break


def plain_value(board: Any, plies: int) -> int:
    """Minimax without pruning, over the same worth of positions."""
    if board.is_insufficient_material():
        return 0
    if plies == 0:
        return -MATE if board.is_checkmate() else _worth(board)
    values = []
    for move in list(board.legal_moves):
        board.push(move)
        values.append(-plain_value(board, plies - 1))
        board.pop()
    return max(values) if values else (-MATE - plies if board.is_check() else 0)


def test_the_best_moves_are_those_of_a_search_without_pruning() -> None:
    rng = np.random.default_rng(1)
    positions = [board for _ in range(3) if (board := early_position(rng))]
    positions += [
        chess.Board("7k/5Q2/8/8/8/8/8/K7 w - - 0 1"),
        chess.Board("6k1/5ppp/8/8/8/8/8/K2R4 w - - 0 1"),
    ]
    for board in positions:
        values = {}
        for move in list(board.legal_moves):
            board.push(move)
            values[move] = -plain_value(board, 1)
            board.pop()
        best = max(values.values())
        assert set(best_moves(board, 2)) == {move for move, value in values.items() if value == best}


def test_opponents_do_what_their_level_says() -> None:
    rng = np.random.default_rng(0)
    hanging = chess.Board("4k3/8/3p4/2p1q3/3P4/8/8/6K1 w - - 0 1")  # a pawn takes a queen or a pawn
    assert {takes_the_most(hanging, rng).uci() for _ in range(20)} == {"d4e5"}
    assert len({moves_at_random(hanging, rng).uci() for _ in range(50)}) > 3
    guarded = chess.Board("4k3/8/3p4/4p3/8/8/8/K3R3 w - - 0 1")  # the pawn on e5 is defended
    assert [move.uci() for move in best_moves(guarded, 1)] == ["e1e5"]
    assert "e1e5" not in {move.uci() for move in best_moves(guarded, 2)}
    assert {LEVELS[4].opponent(guarded, rng).uci(), takes_the_most(guarded, rng).uci()} == {"e1e5"}


def test_a_player_without_errors_mates_in_one_always_and_one_of_errors_only_seldom() -> None:
    env = ChessGame(level=1)
    sides = set()
    for seed in range(100):
        episode = played(env, Player(0.0, seed), seed)
        assert (episode.reward, episode.turns, episode.success) == (1.0, 1, True)
        sides.add(env._first_side)
    assert sides == {chess.WHITE, chess.BLACK}
    assert sum(played(env, Player(1.0, seed), seed).reward for seed in range(200)) < 0.2 * 200


@pytest.mark.parametrize(
    "level", [2, pytest.param(3, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)]
)
def test_a_player_without_errors_wins_games(level: int) -> None:
    for seed in range(3):
        episode = played(ChessGame(level), Player(0.0, seed), seed)
        assert (episode.reward, episode.success) == (1.0, True)


def test_a_player_of_errors_only_hardly_ever_wins() -> None:
    rewards = [played(ChessGame(3, max_turns=40), Player(1.0, seed), seed).reward for seed in range(10)]
    assert sum(reward == 1.0 for reward in rewards) <= 1


@pytest.mark.parametrize("level", [1, 2])
def test_train_and_heldout_positions_never_meet(level: int) -> None:
    drawn = []
    for split in ("train", "heldout"):
        env = ChessGame(level, split=split, instructions=False)
        drawn.append({env.reset(seed=seed)[0] for seed in range(40)})
    assert not drawn[0] & drawn[1]
    assert min(map(len, drawn)) > 35


def test_every_word_said_is_among_words() -> None:
    said = set()
    for seed in range(30):
        said |= played(ChessGame(1, legal=True, instructions=False), Player(0.7, seed), seed).words
        said |= played(ChessGame(2, max_turns=5, instructions=False), Player(1.0, seed), seed).words
    words = {word for word in said if not set(word) <= set("pnbrqk")}  # pieces side by side are no word
    assert words <= set(WORDS) and {"no", "mate", "checkmate", "white", "black"} <= words


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"level": 6}, "must be one of 1, 2, 3, 4, 5"),
        ({"opponent": "human"}, "must be scripted or self"),
        ({"opponent": "self"}, "use level 2 or higher"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        ChessGame(**options)
