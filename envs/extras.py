"""Suites: environments of other packages, each an optional extra of Manta."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Suite:
    """Environments of another package, installed as an optional extra of Manta."""

    prefix: str  # of the ids
    extra: str  # pip install 'manta-rl[EXTRA]'
    package: str  # the package that must be importable
    factory: str  # "module:function" of Manta, called with id and options; its module lists all ids as IDS
    about: str
    install: str = ""  # the command, where the package's own requirements conflict with Manta's

    @property
    def command(self) -> str:
        """How to install it."""
        return self.install or f"pip install 'manta-rl[{self.extra}]'"

    @property
    def installed(self) -> bool:
        """Whether the package can be imported; checked without importing it."""
        return importlib.util.find_spec(self.package) is not None


_HERE = "envs.suites"
# Its requirements pin numpy 1.26 and the clients of a dozen services; its data and its checker need none of them.
_BFCL = "pip install --no-deps bfcl-eval==2026.3.23"
SUITES: tuple[Suite, ...] = (
    Suite("MiniGrid-", "minigrid", "minigrid", f"{_HERE}.minigrid_words:minigrid", "MiniGrid"),
    Suite("BabyAI-", "minigrid", "minigrid", f"{_HERE}.minigrid_words:minigrid", "BabyAI"),
    Suite(
        "reasoning_gym/",
        "reasoning",
        "reasoning_gym",
        f"{_HERE}.reasoning_questions:reasoning_gym",
        "reasoning-gym",
    ),
    Suite(
        "pettingzoo/", "pettingzoo", "pettingzoo", f"{_HERE}.pettingzoo_games:pettingzoo_game", "PettingZoo"
    ),
    Suite("textarena/", "textarena", "textarena", f"{_HERE}.textarena_games:textarena_game", "TextArena"),
    Suite("textworld/", "textworld", "textworld", f"{_HERE}.textworld_games:textworld_game", "TextWorld"),
    Suite("miniwob/", "miniwob", "miniwob", f"{_HERE}.miniwob_pages:miniwob_page", "MiniWoB++"),
    Suite("openenv/", "openenv", "openenv", f"{_HERE}.openenv_clients:openenv", "OpenEnv"),
    Suite(
        "bfcl/multi_turn_",
        "bfcl",
        "bfcl_eval",
        f"{_HERE}.bfcl_turns:BfclTurns",
        "Berkeley Function Calling Leaderboard, several turns",
        install=_BFCL,
    ),
    Suite(
        "bfcl/",
        "bfcl",
        "bfcl_eval",
        f"{_HERE}.bfcl_calls:BfclCalls",
        "Berkeley Function Calling Leaderboard",
        install=_BFCL,
    ),
)
