"""Turn taking, with a game written here: order of moves, observations, rewards, and fault for an end."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

import numpy as np
import pytest

from envs.suites import turn_taking as turns
from envs.suites.turn_taking import GameResult, MoveStatus, TurnGame, scaled


class Counting:
    """From a number the seed says, each seat in turn takes 1, 2 or 3 away; who takes the last is paid 1. Odd says more.

    "odd" is a move the game reads and then ends over, as packages do that judge moves themselves.
    """

    name = "counting"

    def __init__(self, seats: int = 2, left: int | None = None) -> None:
        self.seats = seats
        self._fixed = left
        self.started: list[int] = []
        self.log: list[tuple[int, str]] = []

    def start(self, seed: int) -> None:
        self.started.append(seed)
        self.left = 8 + seed % 5 if self._fixed is None else self._fixed
        self.log, self._winner, self._fault = [], None, None
        self.to_move = 0

    def observation(self, seat: int) -> str:
        return f"seat {seat}: {self.left} left"

    def legal_moves(self) -> list[str] | None:
        return [str(number) for number in (1, 2, 3) if number <= self.left]

    def check_move(self, move: str) -> MoveStatus:
        if move == "odd":
            return "fine"
        return (
            "unreadable" if move not in ("1", "2", "3") else "fine" if int(move) <= self.left else "illegal"
        )

    def play(self, move: str) -> None:
        self.log.append((self.to_move, move))
        if move == "odd":
            self._fault = self.to_move
            return
        self.left -= int(move)
        if not self.left:
            self._winner = self.to_move
        self.to_move = (self.to_move + 1) % self.seats

    def result(self, seat: int) -> GameResult | None:
        if self._winner is None and self._fault is None:
            return None
        return GameResult(float(self._winner == seat or self._fault not in (None, seat)), self._fault == seat)


def threes(observation: str, moves: list[str] | None, rng: np.random.Generator) -> str:
    return moves[-1] if moves else ""


def loses(observation: str, moves: list[str] | None, rng: np.random.Generator) -> str:
    return "odd"


HERE = "tests.envs.suites.test_turn_taking:"


def begun(game: Counting, seed: int = 0, **options: Any) -> tuple[TurnGame, str]:
    env = TurnGame(game, **options)
    return env, env.reset(seed=seed)[0]


def test_others_move_between_the_agents_moves_and_before_its_first() -> None:
    game = Counting(3, left=12)
    env, seen = begun(game, seat=1, opponent=f"{HERE}threes")
    assert (seen, game.log) == ("seat 1: 9 left", [(0, "3")])
    assert env.step(" 1\n") == ("seat 1: 2 left", 0.0, False, False, {})
    assert game.log[1:] == [(1, "1"), (2, "3"), (0, "3")]
    assert env.step("2") == ("seat 1: 0 left", 1.0, True, False, {"success": True})


def test_a_seat_loses_by_another_seats_move() -> None:
    env, _ = begun(Counting(left=4), seat=0, opponent=f"{HERE}threes")
    assert env.step("1") == ("seat 0: 0 left", 0.0, True, False, {"success": False})


def test_the_seed_draws_the_seat_the_game_and_the_opponents_moves() -> None:
    def episode(seed: int) -> tuple[int, list[tuple[int, str]]]:
        game = Counting()
        env, _ = begun(game, seed)
        done = False
        while not done:
            done = env.step("1")[2]
        return env.seat, game.log

    assert [episode(seed) for seed in range(9)] == [episode(seed) for seed in range(9)]
    assert {episode(seed)[0] for seed in range(9)} == {0, 1}
    assert len({str(episode(seed)) for seed in range(9)}) > 6


def test_alone_the_agent_moves_for_every_seat_and_is_paid_for_the_first() -> None:
    for left, paid in ((2, 0.0), (3, 1.0)):
        env, seen = begun(Counting(left=left), opponent="self")
        for turn in range(left - 1):
            assert seen == f"seat {turn % 2}: {left - turn} left"
            seen, *rest = env.step("1")
            assert rest == [0.0, False, False, {"seat": turn % 2}]
        verdict = {"success": paid == 1.0, "seat": (left - 1) % 2}
        assert env.step("1") == ("seat 0: 0 left", paid, True, False, verdict)


@pytest.mark.parametrize("junk", ["odd", "not a move at all"])
def test_alone_a_move_that_is_none_loses_for_the_seat_that_made_it_and_is_no_success(junk: str) -> None:
    for turns_before in range(3):
        env, _ = begun(Counting(left=9), opponent="self")
        assert all(env.step("1")[1] == 0.0 for _ in range(turns_before))
        mover = turns_before % 2
        verdict = {"success": False, "malformed": True, "seat": mover}
        assert env.step(junk)[1:] == (float(mover == 1), True, False, verdict)
        with pytest.raises(RuntimeError, match="call reset"):
            env.step("1")


def test_a_policy_is_asked_for_the_other_seats_moves_and_each_is_told_the_rules_once() -> None:
    game = Counting(left=7)
    env = TurnGame(game, seat=1, opponent="policy", opening="Rules.\n", max_turns=3)
    asked: list[Any] = [env.reset(seed=0)[0]]
    for move in ("3", "1", "nonsense", "1"):
        observation, reward, over, _, info = env.step(move)
        asked.append(observation)
        if over:
            break
    assert asked[0] == [{"role": "user", "content": "Rules.\nseat 0: 7 left", "opponent": True}]
    assert asked[1] == "Rules.\nseat 1: 4 left"
    assert asked[2] == [{"role": "user", "content": "seat 0: 3 left", "opponent": True}]
    # "nonsense" was replaced by a legal move: the game is over, or it left enough for the agent to take one.
    taken = [int(move) for _, move in game.log]
    assert taken[:2] == [3, 1] and taken[2] in (1, 2, 3) and game.log[2][0] == 0
    assert (over, reward) == (taken[2] > 1, float(taken[2] == 2))
    assert info == ({"success": taken[2] == 2} if over else {})


def test_a_policys_moves_are_no_turns_of_the_agent() -> None:
    env = TurnGame(Counting(left=9), seat=0, opponent="policy", max_turns=2)
    env.reset(seed=0)
    assert [env.step("1")[3] for _ in range(3)] == [False, False, True]


def test_no_move_an_illegal_one_and_one_the_game_ends_over_are_told_apart() -> None:
    env, _ = begun(Counting(left=2), seat=0)
    assert env.step("take it all")[1:] == (0.0, True, False, {"success": False, "malformed": True})
    env, seen = begun(Counting(left=2), seat=0, max_turns=2)
    assert env.step("3") == (f"illegal\n{seen}", 0.0, False, False, {}), "it costs a turn and nothing else"
    assert env.step("3") == (f"illegal\n{seen}", 0.0, False, True, {"success": False})
    env, _ = begun(Counting(left=9), seat=0)
    assert env.step("odd")[1:] == (0.0, True, False, {"success": False, "malformed": True})


def test_an_unfinished_game_is_truncated_unpaid_and_a_finished_one_in_its_last_turn_is_not() -> None:
    env, _ = begun(Counting(left=9), seat=0, opponent=f"{HERE}threes", max_turns=1)
    assert env.step("1")[1:] == (0.0, False, True, {"success": False})
    env, _ = begun(Counting(left=9), opponent="self", max_turns=1)
    assert env.step("1")[1:] == (0.5, False, True, {"success": False, "seat": 0}), "alone: half to each"
    env, _ = begun(Counting(left=1), seat=0, max_turns=1)
    assert env.step("1")[1:] == (1.0, True, False, {"success": True})


def test_a_limit_of_the_games_own_truncates_and_pays_what_it_pays_and_a_fault_terminates() -> None:
    class Cut(Counting):
        def result(self, seat: int) -> GameResult | None:
            over = len(self.log) == 2
            return GameResult(0.75, at_fault=self._fault == seat, truncated=True) if over else None

    env, _ = begun(Cut(left=9), opponent="self")
    assert env.step("1")[1:] == (0.0, False, False, {"seat": 0})
    assert env.step("1")[1:] == (0.75, False, True, {"success": False, "seat": 1})
    env.reset(seed=0)
    env.step("1")
    assert env.step("odd")[1:] == (1.0, True, False, {"success": False, "malformed": True, "seat": 1})


@pytest.mark.parametrize(
    ("opponent", "says"),
    [("loses", "lost by 'odd', which is not a move"), ("nobody", "which is not a legal move")],
)
def test_what_an_opponent_does_wrong_is_no_game_won(opponent: str, says: str) -> None:
    module = HERE if opponent == "loses" else "tests.envs.opponents:"
    env, _ = begun(Counting(left=9), seat=0, opponent=f"{module}{opponent}")
    with pytest.raises(RuntimeError, match=f"counting: opponent .*{opponent}.*{says}"):
        env.step("1")


class Model(BaseHTTPRequestHandler):
    """A server whose model gives scripted answers."""

    says: ClassVar[list[str]]
    heard: ClassVar[list[Any]]

    def _answer(self, said: Any) -> None:
        body = json.dumps(said).encode()
        self.send_response(200 if said else 503)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        assert self.path == "/v1/models"
        self._answer({"data": [{"id": "version-40"}]})

    def do_POST(self) -> None:
        assert self.path == "/v1/chat/completions"
        self.heard.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        said = self.says.pop(0)
        self._answer(said and {"choices": [{"message": {"content": said}}]})

    def log_message(self, *arguments: Any) -> None: ...


@pytest.fixture
def served() -> Iterator[str]:
    Model.says, Model.heard = [], []
    with ThreadingHTTPServer(("127.0.0.1", 0), Model) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/v1"
        server.shutdown()


def test_a_model_behind_a_server_moves_by_what_its_seat_sees(served: str) -> None:
    game = Counting(left=9)
    env, _ = begun(game, seat=0, opponent=served)
    Model.says += [" 2\n", "I resign", ""]
    assert env.step("1")[0] == "seat 0: 6 left"
    (asked,) = Model.heard
    assert asked["model"] == "version-40"
    assert asked["messages"] == [{"role": "user", "content": "seat 1: 8 left"}]
    env.step("1")  # its answer is no move: any legal one is made
    assert game.log[3][0] == 1 and game.log[3][1] in ("1", "2", "3")
    with pytest.raises(
        RuntimeError, match=re.escape(f"the opponent at {served}/chat/completions answered 503")
    ):
        env.step("1")
    assert env.nondeterministic
    assert not begun(Counting())[0].nondeterministic


def test_a_server_that_is_not_there_is_named(served: str) -> None:
    address = served.rsplit(":", 1)[0] + ":9/v1"
    with pytest.raises(RuntimeError, match=f"the opponent at {address}/models did not answer"):
        begun(Counting(), seat=1, opponent=address)


def test_a_game_that_never_comes_to_the_agent_is_an_error_with_a_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(turns, "MAX_REPLIES", 5)
    with pytest.raises(RuntimeError, match="seat 7 has no turn within 5 moves of others"):
        begun(Counting(8, left=90), seat=7, opponent="tests.envs.opponents:first")


def test_a_game_that_is_over_before_the_agents_turn_is_drawn_again() -> None:
    class Short(Counting):
        def start(self, seed: int) -> None:
            super().start(seed)
            self.left = 3 if len(self.started) < 4 else 7

    game = Short()
    assert begun(game, seat=1, opponent=f"{HERE}threes")[1] == "seat 1: 4 left"
    assert len(set(game.started)) == 4


def test_no_step_without_a_game() -> None:
    env = TurnGame(Counting(left=1), seat=0)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="call reset"):
            env.step("1")
        env.reset(seed=0)
        env.step("1")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"seat": 2}, "seat=2 must be from 0 to 1"),
        ({"seat": 0, "opponent": "self"}, "omit seat"),
        ({"max_turns": 0}, "use 1 or more"),
        ({"opponent": "stockfish"}, "is not of the form module:function"),
        ({"opponent": "tests.envs.opponents:stockfish"}, "has no function 'stockfish'"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        TurnGame(Counting(), **options)


def test_rewards_on_a_scale() -> None:
    assert [scaled(total, -1, 1) for total in (-3, -1, 0, 0.5, 1, 2)] == [0, 0, 0.5, 0.75, 1, 1]
    assert scaled(30, 10, 50) == 0.5
