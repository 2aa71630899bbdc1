"""MiniGrid and BabyAI in words: the task, the carried object, and the visible objects. Needs the extra minigrid.

Observation: "task: " and the mission; the direction faced and the carried object; then a line for each visible object,
nearest first, with its distance ahead and to the side; then walls and lava, one line per straight run. It contains
everything in the package's partial view except coloured floor; cells that are not listed are free or hidden.
Action: one of the package's own actions by name, of those that the environment has.
Reward: the package's own: on success 1 - 0.9 * steps / max_steps, else 0; -1 for running into a moving obstacle.
Horizon: the package's own max_steps. `info["success"]` is whether the last step's reward was positive.
Ends: where the environment ends (terminated), steps used up (truncated), any other action (malformed).
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.utils import RecordConstructorArgs

from envs.base import ChoiceSpace, Info, text_space, vocabulary
from envs.registry import Env, make_gymnasium
from envs.suites.rng_isolation import suppress_stdout

os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "hide")  # pygame prints a greeting

from minigrid.core.actions import Actions
from minigrid.core.constants import IDX_TO_COLOR, IDX_TO_OBJECT, STATE_TO_IDX

IDS = tuple(env_id for env_id in gym.registry if env_id.startswith(("MiniGrid-", "BabyAI-")))
DIRECTIONS = ("east", "south", "west", "north")  # in MiniGrid's order
STATES = {index: state for state, index in STATE_TO_IDX.items()}
NOT_SHOWN = ("unseen", "empty", "floor")
COLOURLESS = IN_RUNS = ("wall", "lava")
UNREADABLE = "That is no action."
INSTRUCTIONS = (
    "Do the task. The view reaches {ahead} cells ahead and {side} to each side; what stands there is told, and other "
    "cells are free or hidden. left and right turn you; pickup, drop and toggle act on the cell 1 ahead. "
    "Answer with one word: {actions}.\n"
)
_MISSIONS = (  # words of the packages' missions besides colours and objects
    "go to pick up open put next the object an on your left right in front of you behind then after and door square "
    "get avoid find use matching at end hallway must fetch from traverse rooms goal square reach unlock room"
)
WORDS = vocabulary(
    (
        *("task facing carrying nothing ahead", _MISSIONS, UNREADABLE),
        *(*DIRECTIONS, *STATES.values(), *IDX_TO_COLOR.values(), *IDX_TO_OBJECT.values()),
        *(action.name for action in Actions),
    )
)

Cell = tuple[int, int]  # to the right of the player (negative: to the left), ahead of it
Run = tuple[Cell, Cell]  # its first and last cell


def minigrid(env_id: str, instructions: bool = True, **options: Any) -> Env:
    """A replica. instructions: begin with the rules in English. Other options are the environment's own."""
    with suppress_stdout():
        return MiniGridInWords(make_gymnasium(env_id, options), instructions)


class MiniGridInWords(gym.Wrapper[str, str, Any, Any], RecordConstructorArgs):
    """Text wrapper around an environment with MiniGrid's observations and actions."""

    def __init__(self, env: gym.Env[Any, Any], instructions: bool = True) -> None:
        RecordConstructorArgs.__init__(self, instructions=instructions)
        super().__init__(env)
        assert isinstance(env.action_space, gym.spaces.Discrete)
        self._actions = tuple(Actions(index).name for index in range(int(env.action_space.n)))
        self.action_space = ChoiceSpace(self._actions)
        self.observation_space = text_space(1 << 14)
        self._instructions = instructions

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, Info]:
        with suppress_stdout():  # BabyAI prints the instances that it rejects
            observation: Any = self.env.reset(seed=seed, options=options)[0]
        return self._opening(observation) + describe(observation), {}

    def step(self, action: str) -> tuple[str, float, bool, bool, Info]:
        word = action.strip().lower()
        if word not in self._actions:
            return UNREADABLE, 0.0, True, False, {"malformed": True, "success": False}
        observation: Any
        observation, reward, terminated, truncated, _ = self.env.step(Actions[word].value)
        truncated = truncated and not terminated  # the package sets both if the last step solves it
        info: Info = {"success": float(reward) > 0} if terminated or truncated else {}
        return describe(observation), float(reward), bool(terminated), bool(truncated), info

    def _opening(self, observation: dict[str, Any]) -> str:
        if not self._instructions:
            return ""
        *others, last = self._actions
        size = observation["image"].shape[0]
        return INSTRUCTIONS.format(ahead=size - 1, side=size // 2, actions=f"{', '.join(others)} or {last}")


def describe(observation: dict[str, Any]) -> str:
    """A MiniGrid observation (a dict of mission, direction and image [column, row, (type, colour, state)]) in words."""
    seen = _seen(observation["image"])
    carried = seen.pop((0, 0), "nothing")  # the view shows the carried object in the player's own cell
    things = [(cell, cell, what) for cell, what in seen.items() if what not in IN_RUNS]
    ordered = sorted(things, key=lambda thing: (abs(thing[0][0]) + thing[0][1], thing[0]))
    for what in IN_RUNS:
        ordered += [(*run, what) for run in runs(cell for cell, there in seen.items() if there == what)]
    return "\n".join(
        (
            f"task: {observation['mission']}",
            f"facing {DIRECTIONS[observation['direction']]}, carrying {carried}",
            *(f"{what}: {place(first, last)}" for first, last, what in ordered),
        )
    )


def _seen(image: np.ndarray[Any, np.dtype[Any]]) -> dict[Cell, str]:
    """The object in each visible cell that has one."""
    columns, rows, _ = image.shape
    seen = {}
    for column in range(columns):
        for row in range(rows):
            kind, colour, state = map(int, image[column, row])
            what = IDX_TO_OBJECT[kind]
            if what in NOT_SHOWN:
                continue
            if what not in COLOURLESS:
                what = f"{IDX_TO_COLOR[colour]} {what}"
            if IDX_TO_OBJECT[kind] == "door":
                what = f"{STATES[state]} {what}"
            seen[column - columns // 2, rows - 1 - row] = what
    return seen


def runs(cells: Iterable[Cell]) -> list[Run]:
    """Partition cells into straight runs, longest first."""
    left = set(cells)
    found = []
    while left:
        run = max((_run(left, cell, step) for cell in sorted(left) for step in ((1, 0), (0, 1))), key=len)
        left -= set(run)
        found.append((run[0], run[-1]))
    return found


def _run(cells: set[Cell], cell: Cell, step: Cell) -> list[Cell]:
    """The run of cells from this cell in one direction."""
    run = []
    while cell in cells:
        run.append(cell)
        cell = (cell[0] + step[0], cell[1] + step[1])
    return run


def place(first: Cell, last: Cell) -> str:
    """The position of a cell or straight run: "2 ahead, 1 left", "3 ahead, 2 left to 1 right", "0 to 4 ahead"."""
    (west, near), (east, far) = first, last
    parts = []
    if near != far:
        parts.append(f"{near} to {far} ahead")
    elif far:
        parts.append(f"{far} ahead")
    if west < 0 < east:
        parts.append(f"{-west} left to {east} right")
    elif west or east:
        side, ends = ("right", (west, east)) if east > 0 else ("left", (-east, -west))
        parts.append(f"{ends[0]} to {ends[1]} {side}" if west != east else f"{ends[0]} {side}")
    return ", ".join(parts)
