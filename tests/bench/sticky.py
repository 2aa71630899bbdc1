"""An environment that may get stuck; a module of its own, since the process of a replica imports what makes it."""

from __future__ import annotations

import time
from typing import Any

from envs.base import TextEnv


class Sticky(TextEnv):
    """So many turns of nothing; a stuck one sleeps for ever in its second."""

    def __init__(self, turns: int, stuck: bool) -> None:
        self._turns, self._stuck, self._turn = turns, stuck, 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, Any]:
        self._turn = 0
        return "begin", {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        self._turn += 1
        while self._stuck and self._turn == 2:
            time.sleep(3600)
        return "go on", 0.0, self._turn == self._turns, False, {}


def sticky(env_id: str, **options: Any) -> Sticky:
    return Sticky(**options)
