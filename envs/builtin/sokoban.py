"""Sokoban: push every box onto a goal. Boards are made by playing backwards from the solved one, so each is solvable.

Observation: the board, one line per row, in the usual letters: # wall, - floor, @ player, $ box, . goal, * box on a
goal, + player on a goal. After a move without effect, the first line is "blocked".
Action: up, down, left or right. Reward: 1 when all boxes are on goals, else 0. Horizon: `max_turns`.
Levels: 1 one box, one or two pushes, no inner walls; 2 one box farther off, among walls; 3 two boxes; 4 three; 5 three,
farther off on a larger board.
Ends: all boxes on goals (terminated), turns used up (truncated), any other action (malformed). A box that can no longer
be moved does not end the episode.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import permutations
from typing import Any

import numpy as np

from envs.base import Info, Split, TextEnv, check_options, draw_valid, vocabulary

MOVES = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}
BLOCKED, UNREADABLE = "blocked", "That is no direction."
INSTRUCTIONS = (
    "Push every box ($) onto a goal (.) of the warehouse below. You are @; # is a wall, - is floor, * is a box on a "
    "goal, + is you on a goal. You push a box by walking against it, if the cell behind it is free; you cannot pull. "
    "Answer with one word: up, down, left or right.\n"
)
WORDS = vocabulary((*MOVES, BLOCKED, UNREADABLE))
AWAY_FROM_GOALS = 0.9  # probability that backwards play moves a box away from the goals, if it can
MAX_EXPANDED = 100_000  # boards that the solver expands: enough for the largest level

Cell = tuple[int, int]
Cells = frozenset[Cell]
_State = tuple[Cell, Cells]  # player, boxes


@dataclass(frozen=True)
class BoardLevel:
    """A level of difficulty: cells per side including the outer wall, inner walls, boxes, `least_pushes`, and turns."""

    size: int
    walls: int
    boxes: int
    pushes: range
    max_turns: int


LEVELS = {
    1: BoardLevel(size=6, walls=0, boxes=1, pushes=range(1, 3), max_turns=24),
    2: BoardLevel(size=6, walls=3, boxes=1, pushes=range(3, 7), max_turns=32),
    3: BoardLevel(size=7, walls=5, boxes=2, pushes=range(4, 9), max_turns=64),
    4: BoardLevel(size=7, walls=5, boxes=3, pushes=range(5, 11), max_turns=80),
    5: BoardLevel(size=8, walls=7, boxes=3, pushes=range(8, 14), max_turns=96),
}


@dataclass(frozen=True)
class Board:
    """Positions of everything. Walls are the cells that are not floor; goals never change."""

    size: int
    floor: Cells
    goals: Cells
    boxes: Cells
    player: Cell

    @property
    def solved(self) -> bool:
        return self.boxes == self.goals

    def after(self, move: str) -> Board | None:
        """The board after a move; None if a wall or an immovable box is in the way."""
        moved = _moved(self.floor, self.player, self.boxes, MOVES[move])
        return replace(self, player=moved[0], boxes=moved[1]) if moved else None

    def __str__(self) -> str:
        cells = [(row, column) for row in range(self.size) for column in range(self.size)]
        text = "".join(self._letter(cell) for cell in cells)
        return "\n".join(text[start : start + self.size] for start in range(0, len(text), self.size))

    def _letter(self, cell: Cell) -> str:
        on_goal = cell in self.goals
        if cell == self.player:
            return "+" if on_goal else "@"
        if cell in self.boxes:
            return "*" if on_goal else "$"
        return "." if on_goal else "-" if cell in self.floor else "#"


def board_of(rows: list[str]) -> Board:
    """Parse a board from its rows."""
    cells = {(row, column): letter for row, line in enumerate(rows) for column, letter in enumerate(line)}
    holding = {
        letters: frozenset(cell for cell, each in cells.items() if each in letters)
        for letters in (".*+", "$*")
    }
    floor = frozenset(cell for cell, letter in cells.items() if letter != "#")
    player = next(cell for cell, letter in cells.items() if letter in "@+")
    return Board(len(rows), floor, holding[".*+"], holding["$*"], player)


class Sokoban(TextEnv):
    """The environment.

    level: see above. max_turns: moves before truncation; None for the level's own. split: "train" and "heldout" divide
    the boards by content, regardless of the seed; "all" contains both. instructions: begin with the rules in English.
    Raises ValueError for other values.
    """

    def __init__(
        self, level: int = 1, max_turns: int | None = None, split: Split = "all", instructions: bool = True
    ) -> None:
        check_options(level, LEVELS, split, max_turns)
        self._level = LEVELS[level]
        self._max_turns = max_turns or self._level.max_turns
        self._split = split
        self._opening = INSTRUCTIONS if instructions else ""
        self._board: Board | None = None
        self._turns = 0

    @property
    def board(self) -> Board:
        """The current board."""
        if self._board is None:
            raise RuntimeError("there is no board before reset()")
        return self._board

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, Info]:
        super().reset(seed=seed)
        self._board = draw_valid(lambda: _attempt(self._level, self.np_random), str, self._split)
        self._turns = 0
        return f"{self._opening}{self._board}", {}

    def step(self, action: str) -> tuple[str, float, bool, bool, Info]:
        board = self.board
        word = action.strip().lower()
        if word not in MOVES:
            return UNREADABLE, 0.0, True, False, {"malformed": True, "success": False}
        self._turns += 1
        after = board.after(word)
        self._board = after or board
        solved = self._board.solved
        truncated = not solved and self._turns >= self._max_turns
        observation = f"{self._board}" if after else f"{BLOCKED}\n{self._board}"
        info: Info = {"success": solved} if solved or truncated else {}
        return observation, float(solved), solved, truncated, info


def _attempt(level: BoardLevel, rng: np.random.Generator) -> Board | None:
    """A board from backwards play (pulls instead of pushes) from boxes on goals; None if that fails."""
    inside = [(row, column) for row in range(1, level.size - 1) for column in range(1, level.size - 1)]
    mixed = [inside[place] for place in rng.permutation(len(inside))]
    free = mixed[level.walls :]
    floor = frozenset(_walks(free[0], frozenset(free)))
    player, *others = (cell for cell in free if cell in floor)
    goals = frozenset(others[: level.boxes])
    if len(floor) < len(free) - 3 or len(goals) < level.boxes:
        return None
    board = Board(level.size, floor, goals, goals, player)
    wanted = rng.integers(level.pushes.start, level.pushes.stop)
    moves = 0  # of the play backwards, and so enough to solve the board
    made: Board | None = None
    while moves <= level.max_turns - len(floor):
        walks = _walks(board.player, floor - board.boxes)
        if least_pushes(board) in level.pushes and not board.boxes & goals:
            made = replace(board, player=sorted(walks)[rng.integers(len(walks))])
        pulls = [pull for pull in _pulls(board) if pull[0] in walks]
        if not pulls or (made and least_pushes(made) >= wanted):
            break
        # Prefer pulls away from the goals: undirected play leaves most boxes near their start.
        onward = [(at, each) for at, each in pulls if least_pushes(each) > least_pushes(board)]
        pulls = onward if onward and rng.random() < AWAY_FROM_GOALS else pulls
        at, board = pulls[rng.integers(len(pulls))]
        moves += walks[at] + 1
    return made


def _pulls(board: Board) -> Iterator[tuple[Cell, Board]]:
    """For each possible pull: the cell where the player stands, beside a box, and the board after it."""
    free = board.floor - board.boxes
    for box in sorted(board.boxes):
        for down, right in MOVES.values():
            stands, back = (box[0] + down, box[1] + right), (box[0] + 2 * down, box[1] + 2 * right)
            if stands in free and back in free:
                yield stands, replace(board, boxes=board.boxes - {box} | {stands}, player=back)


class Player:
    """Plays a solution with the fewest moves; moves at random with probability `error_rate`. One per episode.

    If an error leaves no solution, or none within the solver's bound, it moves at random from then on.
    """

    def __init__(self, error_rate: float, seed: int) -> None:
        self._error_rate = error_rate
        self._rng = np.random.default_rng(seed)
        self._plan: dict[str, str] = {}  # board -> move, along the last solution
        self._lost = False

    def act(self, observation: str) -> str:
        """The next move, from any observation: each shows the whole board."""
        lines = observation.splitlines()
        rows = lines[-len(lines[-1]) :]
        if self._lost or self._rng.random() < self._error_rate:
            return list(MOVES)[self._rng.integers(len(MOVES))]
        text = "\n".join(rows)
        if text not in self._plan:
            self._plan = dict(solution(text))
            self._lost = not self._plan
        return self._plan[text] if self._plan else self.act(observation)


@lru_cache(maxsize=4096)
def solution(text: str) -> tuple[tuple[str, str], ...]:
    """A solution with the fewest moves, as pairs of board (text) and move; empty if none was found.

    A* over boards with `least_pushes` as the heuristic; expands at most MAX_EXPANDED boards.
    """
    board = board_of(text.split("\n"))
    start: _State = (board.player, board.boxes)
    goals = tuple(sorted(board.goals))
    came: dict[_State, tuple[_State, str] | None] = {start: None}
    moves = {start: 0}
    order = 0  # tie-breaker, because states are not ordered
    queue = [(least_pushes(board), order, start)]
    expanded: set[_State] = set()
    while queue and len(expanded) < MAX_EXPANDED:
        _, _, state = heapq.heappop(queue)
        if state[1] == board.goals:
            return tuple(_retraced(board, came, state))
        if state in expanded:
            continue
        expanded.add(state)
        made = moves[state] + 1
        for name, move in MOVES.items():
            after = _moved(board.floor, *state, move)
            if after is None or made >= moves.get(after, MAX_EXPANDED):
                continue
            left = _least_pushes(board.floor, goals, after[1])
            if left < 0:
                continue  # unsolvable from here
            moves[after], came[after] = made, (state, name)
            order += 1
            heapq.heappush(queue, (made + left, order, after))
    return ()


def _moved(floor: Cells, player: Cell, boxes: Cells, move: Cell) -> _State | None:
    """Player and boxes after a move; None if a wall or an immovable box is in the way."""
    to = (player[0] + move[0], player[1] + move[1])
    if to not in floor:
        return None
    if to not in boxes:
        return to, boxes
    behind = (to[0] + move[0], to[1] + move[1])
    return (to, boxes - {to} | {behind}) if behind in floor and behind not in boxes else None


def _retraced(
    board: Board, came: dict[_State, tuple[_State, str] | None], state: _State
) -> Iterator[tuple[str, str]]:
    while (step := came[state]) is not None:
        state, name = step
        yield str(replace(board, player=state[0], boxes=state[1])), name


def least_pushes(board: Board) -> int:
    """Lower bound on the pushes needed, as if boxes did not block each other; -1 if a box cannot reach a goal."""
    return _least_pushes(board.floor, tuple(sorted(board.goals)), board.boxes)


@lru_cache(maxsize=65536)
def _least_pushes(floor: Cells, goals: tuple[Cell, ...], boxes: Cells) -> int:
    away = [[_pushes_away(floor, goal).get(box, -1) for goal in goals] for box in boxes]
    least = -1
    for order in permutations(range(len(goals))):  # assignment of boxes to goals
        each = [away[box][goal] for box, goal in enumerate(order)]
        if -1 not in each and (least < 0 or sum(each) < least):
            least = sum(each)
    return least


@lru_cache(maxsize=4096)
def _pushes_away(floor: Cells, goal: Cell) -> dict[Cell, int]:
    """Pushes from each cell to a goal, for a single box; unreachable cells are left out."""
    away, edge = {goal: 0}, [goal]
    for cell in edge:
        for down, right in MOVES.values():
            before, pusher = (cell[0] - down, cell[1] - right), (cell[0] - 2 * down, cell[1] - 2 * right)
            if before in floor and pusher in floor and before not in away:
                away[before] = away[cell] + 1
                edge.append(before)
    return away


def _walks(start: Cell, free: Cells) -> dict[Cell, int]:
    """The reachable cells, with their distances in moves."""
    walks, edge = {start: 0}, [start]
    for cell in edge:
        for move in MOVES.values():
            to = (cell[0] + move[0], cell[1] + move[1])
            if to in free and to not in walks:
                walks[to] = walks[cell] + 1
                edge.append(to)
    return walks
