"""A row of doors that no recorded player has crossed from end to end: what the test of stitching plays."""

from __future__ import annotations

from typing import Any

from envs.base import Info, TextEnv

WORDS = ("left", "down", "right", "up")
OPENS = (2, 0, 3, 1)  # the word that opens each door; every other one leads a door back
MIDDLE, MAX_TURNS = 2, 10


class Locks(TextEnv):
    """The doors, numbered. Whoever steps back from the first one is out with nothing; behind the last one is 1.

    start: the "first" door; or "both" that and, for one seed in four, the one in the middle.
    """

    def __init__(self, start: str = "both") -> None:
        self._start = start

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, Info]:
        super().reset(seed=seed)
        late = self._start == "both" and self.np_random.integers(4) == 0
        self._door, self._turns = (MIDDLE if late else 0), 0
        return f"door {self._door}", {}

    def step(self, action: str) -> tuple[str, float, bool, bool, Info]:
        self._door += 1 if action.strip() == WORDS[OPENS[self._door]] else -1
        self._turns += 1
        through, out = self._door == len(OPENS), self._door < 0
        over = not (through or out) and self._turns >= MAX_TURNS
        info: Info = {"success": through} if through or out or over else {}
        return f"door {self._door}", float(through), through or out, over, info


class Player:
    """Opens doors; one that did not begin in the middle turns back there, and never opens a door again."""

    def __init__(self, error_rate: float, seed: int) -> None:
        self._doors: list[int] = []

    def act(self, observation: str) -> str:
        door = int(observation.split()[1])
        self._doors.append(door)
        back = self._doors[0] == 0 and MIDDLE in self._doors
        return WORDS[(OPENS[door] + back) % len(WORDS)]
