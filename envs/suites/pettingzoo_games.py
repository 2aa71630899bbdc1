"""PettingZoo's turn-taking games (AEC API), unmodified, played from one seat. Needs the extra pettingzoo.

Observation: "you are " and the agent's name; the package's observation as text: two planes of pieces as a board, "x"
for the first ("yours" in the classic games), "o" for the second and "." for empty cells, other values as
`envs/spaces_text.py` writes them; then, if the package lists legal actions, "legal " and those.
Action: an action as the space writes it, for most games an integer.
Reward, Horizon, Moves, Opponents: see `envs/suites/turn_taking.py`. The package's rewards of a game are summed and
scaled: `lowest` becomes 0 and `highest` 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pettingzoo
from gymnasium import spaces
from pettingzoo.env_registry.exceptions import PettingZooRegistryError

from envs.registry import Env
from envs.spaces_text import action_format, from_text, require_text_form, to_text
from envs.suites.rng_isolation import IsolatedRng, suppress_stdout
from envs.suites.turn_taking import RANDOM, GameResult, MoveStatus, TurnGame, scaled
from envs.user_functions import load_function

PREFIX = "pettingzoo/"
IDS = tuple(f"{PREFIX}{name}" for name in sorted(pettingzoo.aec_registry))
MASK = "action_mask"
BOARD = "On the board x is the first plane of pieces (yours in the classic games), o the second. "


def pettingzoo_game(
    env_id: str,
    seat: int | None = None,
    opponent: str = RANDOM,
    max_turns: int = 100,
    lowest: float = -1.0,
    highest: float = 1.0,
    instructions: bool = True,
    **options: Any,
) -> Env:
    """A replica of "pettingzoo/" and a name that `pettingzoo.make` knows, or "module:function" that makes an AEC game.

    seat, opponent, max_turns: see TurnGame. lowest, highest: range of a game's return. Others are the game's own.
    """
    if not lowest < highest:
        raise ValueError(f"lowest={lowest} must be less than highest={highest}")
    name = env_id.removeprefix(PREFIX)
    with suppress_stdout():
        game = AecGame(name, _make(name, options), lowest, highest)
    return TurnGame(game, seat, opponent, max_turns, game.opening if instructions else "")


def _make(name: str, options: dict[str, Any]) -> Any:
    if ":" in name:
        return load_function(name)(**options)
    try:
        return pettingzoo.make("aec", name, **options)
    except PettingZooRegistryError as error:  # an unknown name or a missing dependency
        raise ValueError(" ".join(str(error).split())) from error


class AecGame:
    """A `Game` around an AECEnv. ValueError if its spaces have no text form."""

    def __init__(self, name: str, env: Any, lowest: float, highest: float) -> None:
        self.name = name
        self._env = env
        self._agents: list[Any] = list(env.possible_agents)
        self.seats = len(self._agents)
        self._range = lowest, highest
        self._generators = IsolatedRng()
        self._totals: dict[Any, float] = {}
        self._finished: dict[
            Any, tuple[Any, bool]
        ] = {}  # agents that are out -> (last observation, whether truncated)
        for agent in self._agents:
            require_text_form(env.action_space(agent), "actions")
            shown = _shown_space(env.observation_space(agent))
            if not _is_board(shown):
                require_text_form(shown, "observations")

    @property
    def opening(self) -> str:
        """The task in English."""
        first = self._agents[0]
        board = BOARD if _is_board(_shown_space(self._env.observation_space(first))) else ""
        return f"You play {self.name}; win. {board}{action_format(self._env.action_space(first))}\n"

    def start(self, seed: int) -> None:
        self._totals = dict.fromkeys(self._agents, 0.0)
        self._finished = {}
        self._generators.seed(seed)
        with self._generators.entered():
            self._env.reset(seed=seed)
            self._advance()

    @property
    def to_move(self) -> int:
        return self._agents.index(self._env.agent_selection)

    def observation(self, seat: int) -> str:
        agent = self._agents[seat]
        observed = self._finished[agent][0] if agent in self._finished else self._env.observe(agent)
        space = self._env.observation_space(agent)
        lines = [f"you are {agent}", _shown(space, observed)]
        if agent not in self._finished and self._mask() is not None:
            lines.append(" ".join(("legal", *(self.legal_moves() or ()))))
        return "\n".join(lines)

    def legal_moves(self) -> list[str] | None:
        space = self._env.action_space(self._env.agent_selection)
        if not isinstance(space, spaces.Discrete):
            return None
        mask = self._mask()
        allowed = range(int(space.n)) if mask is None else np.flatnonzero(mask).tolist()
        return [to_text(space, int(space.start) + index) for index in allowed]

    def check_move(self, move: str) -> MoveStatus:
        meant = from_text(self._env.action_space(self._env.agent_selection), move)
        if meant is None:
            return "unreadable"
        legal = self.legal_moves()
        return "fine" if legal is None or to_text(self._action_space(), meant) in legal else "illegal"

    def play(self, move: str) -> None:
        with self._generators.entered():
            self._env.step(from_text(self._action_space(), move))
            self._advance()

    def result(self, seat: int) -> GameResult | None:
        agent = self._agents[seat]
        if agent not in self._finished:
            return None
        return GameResult(scaled(self._totals[agent], *self._range), truncated=self._finished[agent][1])

    def _action_space(self) -> spaces.Space[Any]:
        space: spaces.Space[Any] = self._env.action_space(self._env.agent_selection)
        return space

    def _mask(self) -> Any:
        """The action mask of the agent to move, if the package has one."""
        agent = self._env.agent_selection
        observed = self._env.observe(agent)
        if isinstance(observed, Mapping) and MASK in observed:
            return observed[MASK]
        return self._env.infos[agent].get(MASK)

    def _advance(self) -> None:
        """Add up rewards until an agent is to move; agents that are out are removed."""
        while self._env.agents:
            agent = self._env.agent_selection
            observed, reward, terminated, truncated, _ = self._env.last()
            self._totals[agent] += float(reward)
            if not (terminated or truncated):
                return
            self._finished[agent] = observed, bool(truncated and not terminated)
            self._env.step(None)


def _shown_space(space: spaces.Space[Any]) -> spaces.Space[Any]:
    """The part of an observation space that is shown: everything but the action mask."""
    if not isinstance(space, spaces.Dict) or MASK not in space.spaces:
        return space
    parts = {key: part for key, part in space.spaces.items() if key != MASK}
    return next(iter(parts.values())) if len(parts) == 1 else spaces.Dict(parts)


def _is_board(space: spaces.Space[Any]) -> bool:
    """Whether a space holds two binary planes of cells."""
    return (
        isinstance(space, spaces.Box)
        and len(space.shape) == 3
        and space.shape[2] == 2
        and bool((space.low == 0).all() and (space.high == 1).all())
    )


def _shown(space: spaces.Space[Any], observed: Any) -> str:
    """An observation without the mask, as text."""
    shown = _shown_space(space)
    if isinstance(space, spaces.Dict) and MASK in space.spaces:
        rest = {key: value for key, value in observed.items() if key != MASK}
        observed = rest if isinstance(shown, spaces.Dict) else next(iter(rest.values()))
    if not _is_board(shown):
        return to_text(shown, observed)
    cells = np.where(observed[:, :, 0] != 0, "x", np.where(observed[:, :, 1] != 0, "o", "."))
    return "\n".join("".join(row) for row in cells)
