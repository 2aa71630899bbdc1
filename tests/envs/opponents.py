"""Opponents as a user would write them, for turn-taking games: functions named in a recipe."""

from __future__ import annotations

import re

import numpy as np


def first(observation: str, moves: list[str] | None, rng: np.random.Generator) -> str:
    """The first legal move."""
    assert moves
    return moves[0]


def nobody(observation: str, moves: list[str] | None, rng: np.random.Generator) -> str:
    """No move at all."""
    return "I resign."


def nim(observation: str, moves: list[str] | None, rng: np.random.Generator) -> str:
    """TextArena's Nim as Bouton plays it: leave piles whose binary sum is nothing, else take one."""
    piles = [int(size) for size in re.findall(r"pile \d+: (\d+)", observation)][-3:]
    total = np.bitwise_xor.reduce(piles)
    for pile, size in enumerate(piles):
        if (left := int(size ^ total)) < size:
            return f"[{pile} {size - left}]"
    return f"[{next(pile for pile, size in enumerate(piles) if size)} 1]"
