"""FrozenLake in words, over Gymnasium's own FrozenLake: a new solvable map for every seed.

Observation: the first one shows the whole map, a letter per cell, a line per row (S start, F frozen, H hole, G goal);
it and every later one end with the player's position, "row,column", and the cells to the left, below, to the right and
above ("-" is the edge): "1,0 -FHS". With view="map" every observation is the map with the player as P instead.
Action: left, down, right or up. Reward: 1 for reaching the goal, else 0. Horizon: `max_turns`.
Ends: goal or hole (terminated), turns used up (truncated), any other action (malformed).
"""

from __future__ import annotations

from collections import deque
from copy import copy
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from gymnasium.envs.toy_text.frozen_lake import FrozenLakeEnv

from envs.base import MAX_DRAWS, Info, Split, TextEnv, check_options, in_split

ACTIONS = WORDS = ("left", "down", "right", "up")  # in Gymnasium's order
MOVES = ((0, -1), (1, 0), (0, 1), (-1, 0))
EDGE = "-"

_GOAL = "Cross the frozen lake from S to G without stepping into a hole (H). Each line of the map is a row. "
_ANSWER = "Answer with one word: left, down, right or up.\n"
INSTRUCTIONS = {
    "neighbours": f'{_GOAL}The last line says where you are, "row,column", and what lies to the left, below, to the '
    f'right and above ("-" is the edge). {_ANSWER}',
    "map": f"{_GOAL}You are at P. {_ANSWER}",
}

Map = tuple[str, ...]
Cell = tuple[int, int]


class FrozenLake(TextEnv):
    """The environment.

    size: cells per side. frozen_probability: of a cell other than start and goal. slippery: Gymnasium's slipping, one
    third ahead and one third to each side. max_turns: moves before truncation. split: "train" and "heldout" divide the
    maps by content, regardless of the seed, so a held-out map is never trained on; "all" contains both. instructions:
    begin with the rules in English. view: what is shown, see above. Raises ValueError for values that leave nothing to
    play. A seed fixes map and slipping; siblings that act differently slip differently.
    """

    def __init__(
        self,
        size: int = 4,
        frozen_probability: float = 0.8,
        slippery: bool = False,
        max_turns: int = 16,
        split: Split = "all",
        instructions: bool = True,
        view: Literal["neighbours", "map"] = "neighbours",
    ) -> None:
        if size < 2:
            raise ValueError(f"size={size} leaves no room for start and goal; use 2 or more")
        check_options(1, (1,), split, max_turns)
        if not 0 < frozen_probability <= 1:
            raise ValueError(f"frozen_probability={frozen_probability} must lie in (0, 1]")
        if view not in INSTRUCTIONS:
            raise ValueError(f"view={view!r} must be {' or '.join(INSTRUCTIONS)}")
        self._size = size
        self._frozen = frozen_probability
        self._slippery = slippery
        self._max_turns = max_turns
        self._split = split
        self._opening = INSTRUCTIONS[view] if instructions else ""
        self._view = view
        self._lake: FrozenLakeEnv | None = None
        self._drawn: Map = ()
        self._turns = 0
        self._draw(np.random.default_rng(0))  # fails here, before a run begins, if the options admit no map

    @property
    def map(self) -> Map:
        """The current map, one string per row."""
        return self._drawn

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, Info]:
        super().reset(seed=seed)
        drawn = self._draw(self.np_random)
        if drawn != self._drawn or self._lake is None:
            # A copy has its own player and slips, and shares the table of transitions, which is never changed.
            self._lake = copy(_fresh_lake(drawn, self._slippery))
            self._drawn = drawn
        self._turns = 0
        # Slips use a generator of their own, seeded after the map is drawn.
        self._position, _ = self._lake.reset(seed=int(self.np_random.integers(2**31)))
        return self._opening + self._observed(first=True), {}

    def step(self, action: str) -> tuple[str, float, bool, bool, Info]:
        if self._lake is None:
            raise RuntimeError("step() was called before reset()")
        word = action.strip().lower()
        if word not in ACTIONS:
            return "That is no direction.", 0.0, True, False, {"malformed": True, "success": False}
        self._turns += 1
        self._position, reward, terminated, _, _ = self._lake.step(ACTIONS.index(word))
        truncated = not terminated and self._turns >= self._max_turns
        info: Info = {"success": reward > 0} if terminated or truncated else {}
        return self._observed(first=False), float(reward), bool(terminated), truncated, info

    def _draw(self, rng: np.random.Generator) -> Map:
        for _ in range(MAX_DRAWS):
            frozen = rng.random((self._size, self._size)) < self._frozen
            cells = np.where(frozen, "F", "H")
            cells[0, 0], cells[-1, -1] = "S", "G"
            drawn = tuple("".join(row) for row in cells)
            if in_split("\n".join(drawn), self._split) and distances(drawn)[0, 0] >= 0:
                return drawn
        raise ValueError(
            f"none of {MAX_DRAWS} maps of size={self._size} with frozen_probability={self._frozen} is solvable and "
            f"in split={self._split}; raise size or frozen_probability"
        )

    def _observed(self, first: bool) -> str:
        row, column = divmod(int(self._position), self._size)
        if self._view == "map":
            rows = list(self._drawn)
            rows[row] = rows[row][:column] + "P" + rows[row][column + 1 :]
            return "\n".join(rows)
        around = "".join(_at(self._drawn, (row + down, column + right)) for down, right in MOVES)
        here = f"{row},{column} {around}"
        return "\n".join((*self._drawn, here)) if first else here


class Player:
    """Plays a shortest safe path; moves at random with probability `error_rate`. One per episode."""

    def __init__(self, error_rate: float, seed: int) -> None:
        self._error_rate = error_rate
        self._rng = np.random.default_rng(seed)
        self._map: Map = ()
        self._distances = np.zeros((0, 0), dtype=np.int32)

    def act(self, observation: str) -> str:
        """The next move, from an observation of either view; the first observation contains the map."""
        row, column = self._read(observation.splitlines())
        if self._rng.random() < self._error_rate:
            return ACTIONS[self._rng.integers(len(ACTIONS))]
        best = [self._after((row, column), move) for move in MOVES]
        reachable = [(distance, index) for index, distance in enumerate(best) if distance >= 0]
        nearest = min(distance for distance, _ in reachable)
        return ACTIONS[self._rng.choice([index for distance, index in reachable if distance == nearest])]

    def _read(self, lines: list[str]) -> Cell:
        """Remember the map if there is one; return the player's cell."""
        *above, last = lines
        if "," in last:
            if above:
                self._remember(above[-len(above[-1]) :])
            row, column = last.split(" ")[0].split(",")
            return int(row), int(column)
        rows = lines[-len(last) :]
        self._remember(rows)
        return next((row, cells.index("P")) for row, cells in enumerate(rows) if "P" in cells)

    def _remember(self, rows: list[str]) -> None:
        known = tuple(row.replace("P", "F") for row in rows)  # the player's cell is safe
        if known != self._map:  # most observations are of the same map
            self._map, self._distances = known, distances(known)

    def _after(self, cell: Cell, move: Cell) -> int:
        target = (cell[0] + move[0], cell[1] + move[1])
        return int(self._distances[target]) if _at(self._map, target) not in (EDGE, "H") else -1


@lru_cache(maxsize=1024)
def _fresh_lake(drawn: Map, slippery: bool) -> FrozenLakeEnv:
    """Gymnasium's environment of a map; cached, because making one costs more than playing it."""
    return FrozenLakeEnv(desc=list(drawn), is_slippery=slippery)


def distances(drawn: Map) -> np.ndarray[Any, np.dtype[np.int32]]:
    """[size, size] safe moves from each cell to the goal; -1 for holes and cells without a path."""
    size = len(drawn)
    found = np.full((size, size), -1, dtype=np.int32)
    found[-1, -1] = 0
    queue = deque([(size - 1, size - 1)])
    while queue:
        row, column = queue.popleft()
        for down, right in MOVES:
            cell = (row + down, column + right)
            if _at(drawn, cell) not in (EDGE, "H") and found[cell] < 0:
                found[cell] = found[row, column] + 1
                queue.append(cell)
    return found


def _at(drawn: Map, cell: Cell) -> str:
    row, column = cell
    return drawn[row][column] if 0 <= row < len(drawn) and 0 <= column < len(drawn) else EDGE
