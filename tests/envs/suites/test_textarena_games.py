"""TextArena's games, played from one seat: observations and rewards. Needs the extra textarena."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("textarena")

import nltk
import textarena

from envs import registry
from envs.checks.check import check, check_factory
from envs.registry import EnvironmentUnknown
from envs.suites.textarena_games import TextArenaGame
from tests.envs.opponents import nim

TICTACTOE, NIM, GUESS = "textarena/TicTacToe-v0", "textarena/Nim-v0", "textarena/GuessTheNumber-v0"
FIRST, EXPERT = "tests.envs.opponents:first", "tests.envs.opponents:nim"


def begun(env_id: str, seed: int = 0, **options: Any) -> tuple[Any, str]:
    env = registry.make(env_id, **options)
    return env, env.reset(seed=seed)[0]


def test_a_seat_is_told_what_is_new_since_its_last_move() -> None:
    env, seen = begun(TICTACTOE, seat=1, opponent=FIRST)
    assert seen.startswith("[GAME] You are Player 1 in Tic Tac Toe.\n")
    assert (
        "\n[Player 0] [0]\n[GAME] Player 0 placed their symbol (O) in cell 0.\n[GAME] Current Board:" in seen
    )
    seen, *rest = env.step("4")  # the package's own wrapper puts the brackets
    assert rest == [0.0, False, False, {}]
    assert seen.startswith("[GAME] Player 1 placed their symbol (X) in cell 4.\n")
    assert "\n[Player 0] [1]\n" in seen and "You are Player" not in seen and "[Player 1]" not in seen
    assert "Available Moves: '[2]', '[3]', '[5]', '[6]', '[7]', '[8]'" in seen


def test_won_lost_and_drawn_are_paid_to_the_agents_seat() -> None:
    env, _ = begun(TICTACTOE, seat=0, opponent=FIRST)  # which takes the first free cell
    told = [env.step(move) for move in ("[4]", "[3]", "[5]")]
    assert told[-1][1:] == (1.0, True, False, {"success": True})
    assert told[-1][0].endswith("[GAME] Player 0 has won!")
    env, _ = begun(TICTACTOE, seat=1, opponent=FIRST)
    env.step("[3]")
    assert env.step("[4]")[1:] == (0.0, True, False, {"success": False})
    env, _ = begun(TICTACTOE, opponent="self")
    told = [env.step(f"[{cell}]") for cell in (0, 1, 2, 4, 3, 5, 7, 6, 8)]
    assert told[-1][1:] == (0.5, True, False, {"success": False, "seat": 0})
    assert [each[1:] for each in told[:-1]] == [(0.0, False, False, {"seat": turn % 2}) for turn in range(8)]


def test_the_game_warns_once_of_a_move_that_is_none_and_ends_over_the_second() -> None:
    env, _ = begun(TICTACTOE, seat=0, opponent=FIRST)
    seen, *rest = env.step("the middle")
    assert "attempted an invalid move" in seen and rest == [0.0, False, False, {}]
    assert env.step("[9]")[1:] == (0.0, True, False, {"success": False, "malformed": True})
    env.reset(seed=0)
    assert env.step("")[1:] == (0.0, True, False, {"success": False, "malformed": True})


@pytest.mark.parametrize("fine", [[], ["[0]"], ["[0]", "[1]"]])
def test_alone_a_move_that_is_none_loses_for_the_seat_that_made_it(fine: list[str]) -> None:
    env, _ = begun(TICTACTOE, opponent="self")
    for move in [*fine, "junk"]:
        assert env.step(move)[1] == 0.0
    seat = len(fine) % 2
    verdict = {"success": False, "malformed": True, "seat": seat}
    assert env.step("junk")[1:] == (float(seat), True, False, verdict)


def test_a_game_for_one_pays_what_it_pays_and_nothing_for_an_end_over_no_move() -> None:
    for seed in range(3):
        env, seen = begun(GUESS, seed)
        assert "You are playing Guess The Number" in seen
        low, high, done = 1, 20, False
        while not done:
            guess = (low + high) // 2
            seen, paid, done, _, info = env.step(f"[{guess}]")
            if "higher" in seen.lower():
                low = guess + 1
            else:
                high = guess - 1
        assert (paid, info) == (1.0, {"success": True})
    env, _ = begun(GUESS)
    env.step("[1]")
    done = False
    while not done:
        _, paid, done, _, info = env.step("no number")
    assert (paid, info) == (0.0, {"success": False, "malformed": True}), (
        "the package itself pays for what was near"
    )


def test_nim_as_it_is_won_and_never_against_an_expert_who_moves_second_from_nothing() -> None:
    rng = np.random.default_rng(0)
    for seed in range(5):
        env, seen = begun(NIM, seed, seat=0, opponent=EXPERT, piles=[3, 4, 5])
        done = False
        while not done:
            seen, paid, done, _, _ = env.step(nim(seen, None, rng))
        assert paid == 1.0, "3, 4, 5 is won by the first to move"
        env, seen = begun(NIM, seed, seat=0, opponent=EXPERT, piles=[1, 4, 5])
        done = False
        while not done:
            seen, paid, done, _, _ = env.step(nim(seen, None, rng))
        assert paid == 0.0, "1, 4, 5 is won by the second"


def test_at_random_needs_a_game_that_lists_its_moves() -> None:
    for seed in range(4):
        env, seen = begun(TICTACTOE, seed)
        done = False
        while not done:
            move = seen.rpartition("Available Moves: '")[2].partition("'")[0]
            seen, paid, done, _, info = env.step(move)
        assert paid in (0.0, 0.5, 1.0) and "malformed" not in info
    with pytest.raises(ValueError, match="does not list legal moves"):
        begun(NIM, seat=1)


def test_replicas_are_told_apart_and_nothing_is_printed_or_drawn(capfd: pytest.CaptureFixture[str]) -> None:
    env_id = "textarena/Blackjack-v0"

    def episode(env: Any, seed: int, between: Any = None) -> list[str]:
        said, done = [env.reset(seed=seed)[0]], False
        while not done:
            if between:
                between()
            seen, _, done, _, _ = env.step("[Hit]")
            said.append(seen)
        return said

    random.seed(5)
    before = random.getstate()
    alone = episode(registry.make(env_id), 3)
    other = registry.make(env_id)
    assert episode(registry.make(env_id), 3, lambda: (other.reset(seed=9), random.random())) == alone
    assert episode(registry.make(env_id), 4) != alone
    random.setstate(before)
    begun("textarena/LogicPuzzle-v0")[0].step("[nobody x 1]")
    assert random.getstate() == before and capfd.readouterr().out == ""


def test_an_episode_holds_nothing_of_the_one_before() -> None:
    env, first = begun(TICTACTOE, seat=0, opponent=FIRST)
    env.step("[4]")
    assert env.reset(seed=0)[0] == first


def test_word_games_play_with_the_data_that_are_there_and_say_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    with pytest.raises(
        EnvironmentUnknown, match=r"python -m nltk\.downloader words averaged_perceptron_tagger_eng"
    ):
        registry.make("textarena/Hangman-v0")
    words = tmp_path / "corpora" / "words"
    tagger = tmp_path / "taggers" / "averaged_perceptron_tagger_eng"
    words.mkdir(parents=True)
    tagger.mkdir(parents=True)
    for name in ("en", "en-basic"):
        (words / name).write_text("apple\nhouse\nhorse\n", encoding="utf-8")
    (words / "README").write_text("", encoding="utf-8")
    tags = {"weights": {}, "tagdict": dict.fromkeys(("apple", "house", "horse"), "NN"), "classes": ["NN"]}
    for part, value in tags.items():
        (tagger / f"averaged_perceptron_tagger_eng.{part}.json").write_text(
            json.dumps(value), encoding="utf-8"
        )
    paid = {}
    for seed in range(12):
        env, seen = begun("textarena/Wordle-v0", seed)
        assert "You are Playing Wordle" in seen
        seen, reward, done, _, info = env.step("[horse]")
        if done:
            paid[seed] = (reward, info)
        else:
            assert seen.splitlines()[2:4] in (["H O R S E", "G G X G G"], ["H O R S E", "X X X X G"])
            assert "[horse]" not in seen.splitlines(), "one's own words are not said back"
    assert paid and all(each == (1.0, {"success": True}) for each in paid.values())


@pytest.mark.parametrize("env_id", [TICTACTOE, GUESS, "textarena/2048-v0-3x3"])
def test_it_keeps_what_environments_promise(env_id: str) -> None:
    assert check(env_id, seconds=60, turns=8) == []


def test_nim_keeps_what_environments_promise_when_it_is_played() -> None:
    class Expert:
        def __init__(self, seed: int) -> None:
            self._rng = np.random.default_rng(seed)

        def act(self, observation: str) -> str:
            return nim(observation, None, self._rng)

    recipe = registry.env_factory(NIM, opponent=EXPERT)
    assert check_factory(recipe, Expert, seconds=60, in_subprocess=False) == []


@pytest.mark.parametrize(
    ("env_id", "options", "says"),
    [
        ("textarena/TicTacTo-v0", {}, "did you mean TicTacToe-v0"),
        ("textarena/SecretMafia-v0", {}, "is not for one or two players"),
        ("textarena/TwentyQuestions-v0", {}, "cannot be made here: ValueError: OpenRouter API key not found"),
        (NIM, {"pile": [3]}, "cannot be made here: TypeError: .*pile"),
        (NIM, {"seat": 2}, "seat=2 must be from 0 to 1"),
    ],
)
def test_what_is_wrong_is_refused_in_one_line(
    env_id: str, options: dict[str, Any], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENROUTER_API_KEY", raising=False)
    with pytest.raises(EnvironmentUnknown, match=says) as refused:
        registry.make(env_id, **options)
    assert "\n" not in str(refused.value)


def test_for_how_many_a_game_is() -> None:
    seats = {
        name: TextArenaGame(name, {}).seats for name in ("Nim-v0", "Sudoku-v0", "KuhnPoker-v0", "Poker-v0")
    }
    assert seats == {"Nim-v0": 2, "Sudoku-v0": 1, "KuhnPoker-v0": 2, "Poker-v0": 2}
    assert textarena.__version__
