"""Games in which seats take turns, as one of the seats plays them: the others are played for it, or all are its own.

    reset    seed -> the game, and which seat is the agent's -> others move until it is that seat's turn
    step     the agent's move -> others move until it is its turn again, or the game is over for its seat

A package's game is a `Game`; see `envs/suites/pettingzoo_games.py` and `envs/suites/textarena_games.py`.

Reward: at the end, what the package pays the agent's seat, put on a scale from 0 to 1; a game cut by `max_turns` pays
nothing.
Horizon: `max_turns` moves of the agent, illegal ones included, and the package's own limit; both truncate.
Moves: text that is no move ends the game, marked as malformed, unpaid. A move that is not legal now, where the game
says which are, is answered with "illegal" and what was seen before, and costs a turn. Where a package judges moves
itself and ends a game over one of the agent's, that is malformed, too, and unpaid.
Opponents: "random" makes any legal move. "module:function" is called with what its seat sees, its legal moves as
texts (None where the game does not say) and a numpy.random.Generator, and returns its move. "http://..." is a server
that has a past version of the policy, or another model (envs/suites/policy_opponent.py). An opponent whose move is none
is an error, never a game won.
Self-play: with "self" the agent makes the moves of both seats. The reward is that of the seat which moved first, and
`info["seat"]` says with every move whose it was: the learner turns the sign of the other seat's advantages. So that it
stays a game of two, a move that is none loses it for whoever made it, and a game cut by `max_turns` is a draw, half
to each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from envs.base import MAX_DRAWS, Info, TalkSpace, TextEnv, text_space
from envs.suites.policy_opponent import Served
from envs.user_functions import load_function

MAX_REPLIES = 1000  # moves of others between two of the agent's
MAX_MOVE = 1 << 13  # characters
ILLEGAL, UNREADABLE = "illegal", "That is no move."
SELF, RANDOM = "self", "random"

Verdict = Literal["fine", "illegal", "unreadable"]
Reply = Callable[[str, list[str] | None, np.random.Generator], str]


@dataclass(frozen=True, slots=True)
class Result:
    """How a game ended for a seat."""

    paid: float  # from 0 to 1
    at_fault: bool = False  # a move of this seat's that was none ended it
    truncated: bool = False  # it was cut by a limit of the game's own


class Game(Protocol):
    """A game of some package, whose seats are numbered from 0."""

    name: str
    seats: int

    def start(self, seed: int) -> None:
        """A new game."""
        ...

    @property
    def to_move(self) -> int:
        """The seat whose turn it is, in a game that goes on."""
        ...

    def told(self, seat: int) -> str:
        """What a seat sees: asked for when it is to move, and of the agent's seat when the game is over."""
        ...

    def moves(self) -> list[str] | None:
        """The legal moves of the seat that is to move; None where the game does not say."""
        ...

    def judged(self, move: str) -> Verdict:
        """Whether the seat that is to move may make this move; a package that judges itself is asked by `play`."""
        ...

    def play(self, move: str) -> None:
        """A move that is fine."""
        ...

    def result(self, seat: int) -> Result | None:
        """How it ended for a seat; None while it goes on."""
        ...


def moves_at_random(observation: str, moves: list[str] | None, rng: np.random.Generator) -> str:
    """Any legal move."""
    if not moves:
        raise ValueError(
            "this game does not say which moves are legal; use opponent='self' or 'module:function'"
        )
    return moves[rng.integers(len(moves))]


def _reply_of(opponent: str) -> Reply | None:
    """How the others move; None where all seats are the agent's own."""
    if opponent == SELF:
        return None
    if opponent.startswith(("http://", "https://")):
        return Served(opponent)
    return moves_at_random if opponent == RANDOM else load_function(opponent)


class TurnGame(TextEnv):
    """One seat's view of a game.

    seat: the agent's, from 0; None draws it by the seed. opponent, max_turns: see above. opening: the rules in English,
    before the first observation. ValueError for other values.
    """

    action_space = text_space(MAX_MOVE)
    observation_space = TalkSpace()  # packages say what they like, and not in ASCII only

    def __init__(
        self,
        game: Game,
        seat: int | None = None,
        opponent: str = RANDOM,
        max_turns: int = 100,
        opening: str = "",
    ) -> None:
        if max_turns < 1:
            raise ValueError(f"max_turns={max_turns} leaves no turn to play; use 1 or more")
        if seat is not None and not 0 <= seat < game.seats:
            raise ValueError(
                f"seat={seat} must be from 0 to {game.seats - 1}, or left away to be drawn by the seed"
            )
        if seat is not None and opponent == SELF:
            raise ValueError("opponent='self' plays both seats; leave seat away")
        if opponent == SELF and game.seats != 2:
            raise ValueError(f"opponent='self' needs a game of two, and {game.name} has {game.seats} seats")
        self._game = game
        self._fixed = seat
        self._reply = _reply_of(opponent)
        self.nondeterministic = isinstance(self._reply, Served)
        self._opponent = opponent
        self._max_turns = max_turns
        self._opening = opening
        self._seat = 0
        self._turns = 0
        self._shown: str | None = None  # None where there is no game that goes on

    @property
    def seat(self) -> int:
        """The seat that is paid for."""
        return self._seat

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, Info]:
        super().reset(seed=seed)
        self._turns = 0
        for _ in range(MAX_DRAWS):
            self._game.start(int(self.np_random.integers(2**31)))
            self._seat = self._seated()
            self._others_move()
            if self._game.result(self._seat) is None:
                break
        else:
            raise RuntimeError(f"{self._game.name} is always over before seat {self._seat} has a turn")
        self._shown = self._game.told(self._game.to_move)
        return self._opening + self._shown, {}

    def step(self, action: str) -> tuple[str, float, bool, bool, Info]:
        if self._shown is None:
            raise RuntimeError("step() was called without a game that goes on; call reset()")
        move = action.strip()
        verdict = self._game.judged(move) if len(move) <= MAX_MOVE else "unreadable"
        mover = self._game.to_move
        if verdict == "unreadable":
            return self._ended(UNREADABLE, Result(0.0, at_fault=True), mover)
        self._turns += 1
        if verdict == "fine":
            self._game.play(move)
            if (own := self._game.result(mover)) and own.at_fault:
                return self._ended(self._game.told(self._seat), own, mover)
            self._others_move()
            if result := self._game.result(self._seat):
                return self._ended(self._game.told(self._seat), result, mover)
            self._shown = self._game.told(self._game.to_move)
        observation = self._shown if verdict == "fine" else f"{ILLEGAL}\n{self._shown}"
        if self._turns >= self._max_turns:
            return self._ended(observation, Result(0.0 if self._reply else 0.5, truncated=True), mover)
        return observation, 0.0, False, False, self._whose(mover)

    def _seated(self) -> int:
        if self._reply is None:
            return self._game.to_move
        return int(self.np_random.integers(self._game.seats)) if self._fixed is None else self._fixed

    def _others_move(self) -> None:
        """Have the others move until it is the agent's turn, or the game is over for its seat."""
        if self._reply is None:
            return
        game = self._game
        for _ in range(MAX_REPLIES):
            if game.result(self._seat) is not None or (mover := game.to_move) == self._seat:
                return
            seen = game.told(mover)
            move = self._reply(seen, game.moves(), self.np_random).strip()
            if game.judged(move) != "fine":
                raise RuntimeError(
                    f"{game.name}: opponent {self._opponent} said {move[:80]!r}, which is no legal move"
                )
            game.play(move)
            if (result := game.result(mover)) and result.at_fault:
                raise RuntimeError(
                    f"{game.name}: opponent {self._opponent} lost by {move[:80]!r}, which is no move"
                )
        raise RuntimeError(f"{game.name}: seat {self._seat} has no turn within {MAX_REPLIES} moves of others")

    def _whose(self, mover: int) -> Info:
        """With "self", which side's move it was: 0 for the seat that is paid."""
        return {"seat": int(mover != self._seat)} if self._reply is None else {}

    def _ended(self, observation: str, result: Result, mover: int) -> tuple[str, float, bool, bool, Info]:
        self._shown = None
        paid = float(mover != self._seat) if result.at_fault else result.paid
        info: Info = {"success": paid == 1.0 and not result.at_fault} | self._whose(mover)
        if result.at_fault:
            info["malformed"] = True
        truncated = result.truncated and not result.at_fault
        return observation, paid, not truncated, truncated, info


def scaled(total: float, lowest: float, highest: float) -> float:
    """A sum of rewards on a scale from 0 (lowest) to 1 (highest); what lies outside is cut."""
    return float(min(max((total - lowest) / (highest - lowest), 0.0), 1.0))
