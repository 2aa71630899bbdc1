"""Chess by the rules of python-chess: mates in one, and whole games against a scripted opponent or in self-play.

Observation: the board from rank 8 down to rank 1 in FEN's letters (white in capitals, "." for an empty square), then
the side to move, castling rights and en passant square as in FEN: "white KQkq -". With `legal` a last line lists the
legal moves, "legal e2e4 ...". After an illegal move the first line is "illegal"; at the end the last names the reason.
Action: a move in UCI, "e2e4", "e1g1" to castle, "e7e8q" to promote.
Reward: at the end of a game 1 for a win, 0.5 for a draw, 0 for a loss, for the side that moved first, which is the
agent's; an unfinished game pays 0. Level 1 pays 1 for mate and 0 otherwise.
Self-play: with opponent="self" the agent makes both sides' moves in turn. The reward still belongs to the first side,
and `info["seat"]` names the player of every move; the learner flips the sign of the other side's advantages. Text that
is not a move loses the game for its side, and an unfinished game is a draw.
Horizon: `max_turns` moves of the agent, illegal ones included.
Levels: 1 a mate in one; from 2 on a whole game, a few moves after its start, with either colour, against a player that
2 moves at random, 3 takes the most valuable piece it can, else moves at random, 4 looks one ply deep, 5 two plies.
Ends: mate, stalemate, insufficient material, 75 moves without progress, fivefold repetition, and in level 1 any legal
move (terminated); turns used up (truncated); text that is not a move in UCI (malformed).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from envs.base import Info, Split, TextEnv, check_options, draw_valid, vocabulary

try:
    import chess
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        "chess needs an optional package: pip install 'manta-rl[chess]'", name="chess"
    ) from missing

ILLEGAL, NO_MATE, UNREADABLE = "illegal", "no mate", "That is no move."
INSTRUCTIONS = (
    "Play chess. The board is shown from rank 8 down to rank 1, white in capitals; below it stand the side to move, "
    "castling rights and the en passant square. {task} Answer with one move in UCI, such as e2e4 or e7e8q.\n"
)
TASKS = {
    "mate": "Mate in one move.",
    "game": "You play the side to move; win.",
    "self": "You make the moves of both sides; whichever is to move, play for it.",
}
ENDS = ("CHECKMATE", "STALEMATE", "INSUFFICIENT_MATERIAL", "SEVENTYFIVE_MOVES", "FIVEFOLD_REPETITION")
SIDES = {chess.WHITE: "white", chess.BLACK: "black"}
WORDS = vocabulary(
    (
        *(end.lower().replace("_", " ") for end in ENDS),
        *SIDES.values(),
        *("legal", ILLEGAL, NO_MATE, UNREADABLE),
    )
)

VALUES = {chess.PAWN: 100, chess.KNIGHT: 300, chess.BISHOP: 310, chess.ROOK: 500, chess.QUEEN: 900}
MATE = 100_000
PLAYER_PLIES = 3  # search depth of the scripted player
ATTACKERS = ("Q", "RR", "QR", "QN", "QB", "RBN")  # besides the king, of the side that mates in one

_UCI = re.compile("[a-h][1-8][a-h][1-8][qrbn]?")
Opponent = Callable[[chess.Board, np.random.Generator], chess.Move]


def moves_at_random(board: chess.Board, rng: np.random.Generator) -> chess.Move:
    """A random legal move."""
    moves = list(board.legal_moves)
    return moves[rng.integers(len(moves))]


def takes_the_most(board: chess.Board, rng: np.random.Generator) -> chess.Move:
    """A capture of the most valuable piece if there is one, else any move; ties at random."""
    moves = list(board.legal_moves)
    most = max(_captured(board, move) for move in moves)
    best = [move for move in moves if _captured(board, move) == most]
    return best[rng.integers(len(best))]


def looks_ahead(plies: int) -> Opponent:
    """An opponent that plays a best move of a search to this depth."""

    def reply(board: chess.Board, rng: np.random.Generator) -> chess.Move:
        best = best_moves(board, plies)
        return best[rng.integers(len(best))]

    return reply


@dataclass(frozen=True)
class GameLevel:
    """The opponent (None if one move decides) and the number of turns."""

    opponent: Opponent | None
    max_turns: int


LEVELS = {
    1: GameLevel(None, 3),
    2: GameLevel(moves_at_random, 80),
    3: GameLevel(takes_the_most, 80),
    4: GameLevel(looks_ahead(1), 100),
    5: GameLevel(looks_ahead(2), 100),
}


class ChessGame(TextEnv):
    """The environment.

    level: see above. max_turns: the agent's moves before truncation; None for the level's own. opponent: "scripted" or
    "self". legal: list the legal moves. split: "train" and "heldout" divide the starting positions, regardless of the
    seed; "all" contains both. instructions: begin with the rules in English. Raises ValueError for other values.
    """

    def __init__(
        self,
        level: int = 1,
        max_turns: int | None = None,
        opponent: Literal["scripted", "self"] = "scripted",
        legal: bool = False,
        split: Split = "all",
        instructions: bool = True,
    ) -> None:
        check_options(level, LEVELS, split, max_turns)
        if opponent not in ("scripted", "self"):
            raise ValueError(f"opponent={opponent!r} must be scripted or self")
        if level == 1 and opponent == "self":
            raise ValueError(
                "opponent='self' needs whole games, and level 1 is a mate in one; use level 2 or higher"
            )
        self._puzzle = level == 1
        self._self_play = opponent == "self"
        self._play_opponent = None if self._self_play else LEVELS[level].opponent
        self._max_turns = max_turns or LEVELS[level].max_turns
        self._legal = legal
        self._split = split
        task = TASKS["mate" if self._puzzle else "self" if self._self_play else "game"]
        self._opening = INSTRUCTIONS.format(task=task) if instructions else ""
        self._board: chess.Board | None = None
        self._first_side = chess.WHITE
        self._turns = 0

    @property
    def board(self) -> chess.Board:
        """The current position."""
        if self._board is None:
            raise RuntimeError("there is no position before reset()")
        return self._board

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, Info]:
        super().reset(seed=seed)
        attempt = mate_in_one if self._puzzle else early_position
        self._board = draw_valid(lambda: attempt(self.np_random), lambda board: str(board.epd()), self._split)
        self._first_side = self._board.turn
        self._turns = 0
        return self._opening + self._observed(), {}

    def step(self, action: str) -> tuple[str, float, bool, bool, Info]:
        board = self.board
        word = action.strip().lower()
        by_second = self._self_play and board.turn != self._first_side
        seat: Info = {"seat": int(by_second)} if self._self_play else {}
        if not _UCI.fullmatch(word):
            return UNREADABLE, float(by_second), True, False, {"malformed": True, "success": False} | seat
        self._turns += 1
        move = next((each for each in board.legal_moves if each.uci() == word), None)
        if move is not None:
            self._play(move)
            outcome = board.outcome()
            if outcome or self._puzzle:
                end = outcome.termination.name.lower().replace("_", " ") if outcome else NO_MATE
                won = outcome is not None and outcome.winner == self._first_side
                reward = paid(won, outcome is not None and outcome.winner is None, self._puzzle)
                return f"{_rows(board)}\n{end}", reward, True, False, {"success": won} | seat
        observation = self._observed() if move else f"{ILLEGAL}\n{self._observed()}"
        if self._turns < self._max_turns:
            return observation, 0.0, False, False, seat
        return observation, 0.5 if self._self_play else 0.0, False, True, {"success": False} | seat

    def _play(self, move: chess.Move) -> None:
        """Make a move and, if the game continues against an opponent, the opponent's reply."""
        self.board.push(move)
        if self._play_opponent and not self.board.is_game_over():
            self.board.push(self._play_opponent(self.board, self.np_random))

    def _observed(self) -> str:
        board = self.board
        _, _, castling, en_passant = board.epd().split(" ")
        lines = [_rows(board), f"{SIDES[board.turn]} {castling} {en_passant}"]
        if self._legal:
            lines.append(" ".join(("legal", *(move.uci() for move in board.legal_moves))))
        return "\n".join(lines)


def paid(won: bool, drawn_game: bool, puzzle: bool) -> float:
    """The reward of a finished game for the side that moved first; a puzzle has no draws."""
    return 1.0 if won else 0.5 if drawn_game and not puzzle else 0.0


def early_position(rng: np.random.Generator) -> chess.Board | None:
    """A position after a few random moves, with either side to move; None if the game is over by then."""
    board = chess.Board()
    for _ in range(rng.integers(2, 8)):
        if board.is_game_over():
            return None
        board.push(moves_at_random(board, rng))
    board.clear_stack()
    return None if board.is_game_over() else board


def mate_in_one(rng: np.random.Generator) -> chess.Board | None:
    """A lone king on the edge, and a side to move that can mate at once; None if it cannot."""
    pieces = ATTACKERS[rng.integers(len(ATTACKERS))]
    side = bool(rng.integers(2))
    hunted, king, *squares = map(int, rng.choice(64, size=len(pieces) + 2, replace=False))
    if {chess.square_file(hunted), chess.square_rank(hunted)}.isdisjoint({0, 7}):
        return None
    board = chess.Board(None)
    board.turn = side
    board.set_piece_at(hunted, chess.Piece(chess.KING, not side))
    for square, piece in zip((king, *squares), f"K{pieces}", strict=True):
        board.set_piece_at(square, chess.Piece(chess.PIECE_SYMBOLS.index(piece.lower()), side))
    if not board.is_valid():
        return None
    return (
        board if any(board.gives_check(move) and _mates(board, move) for move in board.legal_moves) else None
    )


class Player:
    """Searches `PLAYER_PLIES` plies for the side to move; errs with probability `error_rate`. One per episode.

    It always finds a mate in one; of 20 games against each level's opponent it drew two (level 5) and won the others.
    """

    def __init__(self, error_rate: float, seed: int) -> None:
        self._error_rate = error_rate
        self._rng = np.random.default_rng(seed)
        self._visited: set[str] = set()  # reached before; avoided to make progress

    def act(self, observation: str) -> str:
        """The next move, from any observation: each shows the whole board."""
        board = board_of(observation)
        if self._rng.random() < self._error_rate:
            return str(moves_at_random(board, self._rng).uci())
        best = best_moves(board, PLAYER_PLIES)
        after = {move: self._reached(board, move) for move in best}
        fresh = [move for move in best if after[move] not in self._visited] or best
        move = fresh[self._rng.integers(len(fresh))]
        self._visited.add(after[move])
        return str(move.uci())

    @staticmethod
    def _reached(board: chess.Board, move: chess.Move) -> str:
        board.push(move)
        position = str(board.epd())
        board.pop()
        return position


def board_of(observation: str) -> chess.Board:
    """The position shown by an observation of a running game."""
    lines = observation.splitlines()
    *above, last = lines if not lines[-1].startswith("legal") else lines[:-1]
    ranks = "/".join(re.sub(r"\.+", lambda empty: str(len(empty[0])), row) for row in above[-8:])
    side, castling, en_passant = last.split(" ")
    return chess.Board(f"{ranks} {side[0]} {castling} {en_passant} 0 1")


def best_moves(board: chess.Board, plies: int) -> list[chess.Move]:
    """All legal moves of the highest value at this search depth; alpha-beta."""
    best = -MATE * 2
    found: list[chess.Move] = []
    for move in _ordered(board):
        board.push(move)
        value = -_value(board, plies - 1, -MATE * 2, 1 - best)  # exact where it is `best` or more
        board.pop()
        if value > best:
            best, found = value, []
        if value == best:
            found.append(move)
    return found


def _value(board: chess.Board, plies: int, alpha: int, beta: int) -> int:
    """The value of a position for the side to move, in centipawns; exact between alpha and beta."""
    if board.is_insufficient_material():
        return 0
    if plies == 0:
        mated = board.is_check() and not any(board.legal_moves)
        return -MATE if mated else _worth(board)
    best = -MATE * 2
    for move in _ordered(board):
        board.push(move)
        best = max(best, -_value(board, plies - 1, -beta, -alpha))
        board.pop()
        alpha = max(alpha, best)
        if alpha >= beta:
            return best
    if best == -MATE * 2:  # no legal move
        return -MATE - plies if board.is_check() else 0  # an earlier mate is worse
    return best


def _worth(board: chess.Board) -> int:
    """Material, advanced pawns, and, for a side that is well ahead, how far the enemy king is driven to the edge."""
    ours = _material(board, board.turn) - _material(board, not board.turn)
    if abs(ours) < 400:
        return ours
    ahead = board.turn if ours > 0 else not board.turn
    king, hunted = (chess.lsb(board.pieces_mask(chess.KING, side)) for side in (ahead, not ahead))
    file, rank = chess.square_file(hunted), chess.square_rank(hunted)
    driven = 4 * (abs(2 * file - 7) + abs(2 * rank - 7)) - 3 * chess.square_manhattan_distance(king, hunted)
    return ours + driven if ours > 0 else ours - driven


def _material(board: chess.Board, side: chess.Color) -> int:
    total = sum(value * board.pieces_mask(piece, side).bit_count() for piece, value in VALUES.items())
    ranks = (chess.square_rank(pawn) for pawn in chess.scan_forward(board.pieces_mask(chess.PAWN, side)))
    return total + sum(4 * (rank if side else 7 - rank) for rank in ranks)


def _ordered(board: chess.Board) -> list[chess.Move]:
    """Captures first, most valuable first: good move ordering for alpha-beta."""
    return sorted(board.legal_moves, key=lambda move: _captured(board, move), reverse=True)


def _captured(board: chess.Board, move: chess.Move) -> int:
    """The value of the piece that a move captures."""
    if board.is_en_passant(move):
        return VALUES[chess.PAWN]
    piece = board.piece_type_at(move.to_square)
    return VALUES[piece] if piece else 0


def _mates(board: chess.Board, move: chess.Move) -> bool:
    board.push(move)
    mated = board.is_checkmate()
    board.pop()
    return bool(mated)


def _rows(board: chess.Board) -> str:
    return str(board).replace(" ", "")
