"""Turn-taking games as environments: the agent plays one seat, or all of them (self-play).

    reset    seed -> the game and the agent's seat -> others move until it is that seat's turn
    step     the agent's move -> others move until it is its turn again, or the game is over for its seat

A package's game is a `Game`; see `envs/suites/pettingzoo_games.py` and `envs/suites/textarena_games.py`.

Reward: at the end, the package's payoff of the agent's seat, scaled to [0, 1]; a game cut by `max_turns` pays 0.
Horizon: `max_turns` moves of the agent, illegal ones included, and the package's own limit; both truncate.
Moves: text that is not a move ends the game, malformed and unpaid. A move that is illegal now, if the game lists legal
moves, is answered with "illegal" and the previous observation, and costs a turn. If a package judges moves itself and
ends a game over one of the agent's, that is malformed and unpaid, too.
Opponents: "random" plays any legal move. "module:function" is called with its seat's observation, its legal moves as
texts (None if the game does not list them) and a numpy.random.Generator, and returns a move. "http://..." is a server
with a past version of the policy, or another model (envs/suites/policy_opponent.py). An invalid move of an opponent is
an error, never a win. "policy": another policy of the run, or a past version of the same (docs/leagues.md), for games
that list legal moves; a move of it that is none of them is replaced by a random one.
Self-play: with "self" the agent plays both seats. The reward belongs to the seat that moved first, and `info["seat"]`
names the player of every move; the learner flips the sign of the second player's advantages. To keep the game zero-sum,
an invalid move loses the game for its player, and a game cut by `max_turns` is a draw (0.5).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from envs.base import MAX_DRAWS, Info, Observation, TalkSpace, TextEnv, for_opponent, text_space
from envs.suites.policy_opponent import PolicyOpponent
from envs.user_functions import load_function

MAX_REPLIES = 1000  # moves of others between two moves of the agent
MAX_MOVE = 1 << 13  # characters
ILLEGAL, UNREADABLE = "illegal", "That is no move."
SELF, RANDOM, POLICY = "self", "random", "policy"

MoveStatus = Literal["fine", "illegal", "unreadable"]
Opponent = Callable[[str, list[str] | None, np.random.Generator], str]


@dataclass(frozen=True, slots=True)
class GameResult:
    """The result of a game for one seat."""

    reward: float  # from 0 to 1
    at_fault: bool = False  # ended by an invalid move of this seat
    truncated: bool = False  # cut by a limit of the game itself


class Game(Protocol):
    """A game of some package, with seats numbered from 0."""

    name: str
    seats: int

    def start(self, seed: int) -> None:
        """Start a new game."""
        ...

    @property
    def to_move(self) -> int:
        """The seat whose turn it is, while the game runs."""
        ...

    def observation(self, seat: int) -> str:
        """What a seat observes; called when it is to move, and for the agent's seat at the end."""
        ...

    def legal_moves(self) -> list[str] | None:
        """The legal moves of the seat to move; None if the game does not list them."""
        ...

    def check_move(self, move: str) -> MoveStatus:
        """Whether the seat to move may make this move; a package may judge moves in `play` instead."""
        ...

    def play(self, move: str) -> None:
        """Make a legal move."""
        ...

    def result(self, seat: int) -> GameResult | None:
        """The result for a seat; None while the game runs."""
        ...


def moves_at_random(observation: str, moves: list[str] | None, rng: np.random.Generator) -> str:
    """A random legal move."""
    if not moves:
        raise ValueError("this game does not list legal moves; use opponent='self' or 'module:function'")
    return moves[rng.integers(len(moves))]


def _load_opponent(opponent: str) -> Opponent | None:
    """The opponent's function; None in self-play, and where another policy is asked."""
    if opponent in (SELF, POLICY):
        return None
    if opponent.startswith(("http://", "https://")):
        return PolicyOpponent(opponent)
    return moves_at_random if opponent == RANDOM else load_function(opponent)


class TurnGame(TextEnv):
    """A game as an environment.

    seat: the agent's, from 0; None draws it from the seed. opponent, max_turns: see above. opening: the rules in
    English, prepended to the first observation. ValueError for other values.
    """

    action_space = text_space(MAX_MOVE)
    observation_space = TalkSpace()  # packages write any text, not only ASCII

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
                f"seat={seat} must be from 0 to {game.seats - 1}; omit it to draw it from the seed"
            )
        if seat is not None and opponent == SELF:
            raise ValueError("opponent='self' plays both seats; omit seat")
        if opponent == SELF and game.seats != 2:
            raise ValueError(f"opponent='self' needs a game with two seats; {game.name} has {game.seats}")
        self._game = game
        self._fixed = seat
        self._opponent = _load_opponent(opponent)
        self._plays_itself = opponent == SELF
        self._meets_policy = opponent == POLICY
        self.nondeterministic = isinstance(self._opponent, PolicyOpponent)
        self._opponent_name = opponent
        self._max_turns = max_turns
        self._opening = opening
        self._seat = 0
        self._turns = 0
        self._told: set[int] = set()  # seats that have seen the opening
        self._shown: str | None = None  # the last observation; None while no game runs

    @property
    def seat(self) -> int:
        """The seat that receives the reward."""
        return self._seat

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, Info]:
        super().reset(seed=seed)
        self._turns = 0
        for _ in range(MAX_DRAWS):
            self._game.start(int(self.np_random.integers(2**31)))
            self._seat = self._choose_seat()
            self._others_move()
            if self._game.result(self._seat) is None:
                break
        else:
            raise RuntimeError(f"{self._game.name} always ends before seat {self._seat} has a turn")
        self._shown = self._game.observation(self._game.to_move)
        self._told.clear()
        opened = self._shown if self._meets_policy else self._opening + self._shown
        return self._directed(opened), {}

    def step(self, action: str) -> tuple[Any, float, bool, bool, Info]:
        if self._shown is None:
            raise RuntimeError("step() was called without a running game; call reset() first")
        mover = self._game.to_move
        by_policy = self._meets_policy and mover != self._seat
        move = self._legal(action.strip()) if by_policy else action.strip()
        status = self._game.check_move(move) if len(move) <= MAX_MOVE else "unreadable"
        if status == "unreadable":
            return self._end(UNREADABLE, GameResult(0.0, at_fault=True), mover)
        self._turns += not by_policy
        if status == "fine":
            self._game.play(move)
            if (own := self._game.result(mover)) and own.at_fault:
                return self._end(self._game.observation(self._seat), own, mover)
            self._others_move()
            if result := self._game.result(self._seat):
                return self._end(self._game.observation(self._seat), result, mover)
            self._shown = self._game.observation(self._game.to_move)
        observation = self._shown if status == "fine" else f"{ILLEGAL}\n{self._shown}"
        if self._turns >= self._max_turns and not by_policy:
            unfinished = 0.5 if self._plays_itself else 0.0
            return self._end(observation, GameResult(unfinished, truncated=True), mover)
        return self._directed(observation), 0.0, False, False, self._seat_info(mover)

    def _choose_seat(self) -> int:
        if self._plays_itself:
            return self._game.to_move
        return int(self.np_random.integers(self._game.seats)) if self._fixed is None else self._fixed

    def _directed(self, observation: str) -> Observation:
        """An observation for whoever is to move; between policies each is told the rules with its first one."""
        if not self._meets_policy:
            return observation
        mover = self._game.to_move
        text = observation if mover in self._told else self._opening + observation
        self._told.add(mover)
        return text if mover == self._seat else for_opponent(text)

    def _legal(self, move: str) -> str:
        """The move of another policy, or a random legal one in the place of what is no move."""
        moves = self._game.legal_moves()
        return move if moves and move in moves else moves_at_random("", moves, self.np_random)

    def _others_move(self) -> None:
        """Play the others until it is the agent's turn or the game is over for its seat."""
        if self._opponent is None:
            return
        game = self._game
        for _ in range(MAX_REPLIES):
            if game.result(self._seat) is not None or (mover := game.to_move) == self._seat:
                return
            seen = game.observation(mover)
            move = self._opponent(seen, game.legal_moves(), self.np_random).strip()
            if game.check_move(move) != "fine":
                raise RuntimeError(
                    f"{game.name}: opponent {self._opponent_name} played {move[:80]!r}, which is not a legal move"
                )
            game.play(move)
            if (result := game.result(mover)) and result.at_fault:
                raise RuntimeError(
                    f"{game.name}: opponent {self._opponent_name} lost by {move[:80]!r}, which is not a move"
                )
        raise RuntimeError(f"{game.name}: seat {self._seat} has no turn within {MAX_REPLIES} moves of others")

    def _seat_info(self, mover: int) -> Info:
        """In self-play, who made the move: 0 for the seat that is paid, 1 for the other."""
        return {"seat": int(mover != self._seat)} if self._plays_itself else {}

    def _end(self, observation: str, result: GameResult, mover: int) -> tuple[str, float, bool, bool, Info]:
        self._shown = None
        reward = float(mover != self._seat) if result.at_fault else result.reward
        info: Info = {"success": reward == 1.0 and not result.at_fault} | self._seat_info(mover)
        if result.at_fault:
            info["malformed"] = True
        truncated = result.truncated and not result.at_fault
        return observation, reward, not truncated, truncated, info


def scaled(total: float, lowest: float, highest: float) -> float:
    """A return scaled to [0, 1] from [lowest, highest], clipped."""
    return float(min(max((total - lowest) / (highest - lowest), 0.0), 1.0))
