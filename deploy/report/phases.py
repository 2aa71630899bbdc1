"""Where the time of a run goes: seconds by phase, and what passes from the command to the first episode."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil


def since_command() -> float:
    """Seconds since this process was started."""
    return time.time() - psutil.Process().create_time()


class Phases:
    """Seconds by phase. Of a phase that is entered several times at once, the time in which it was entered at all."""

    def __init__(self) -> None:
        self._ended: dict[str, float] = {}
        self._open: dict[str, tuple[int, float]] = {}  # how often it is entered, and since when

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Count what passes until the end of the block to the phase."""
        entered, began = self._open.get(phase, (0, time.perf_counter()))
        self._open[phase] = entered + 1, began
        try:
            yield
        finally:
            entered, began = self._open.pop(phase)
            if entered > 1:
                self._open[phase] = entered - 1, began
            else:
                self.add(phase, time.perf_counter() - began)

    def add(self, phase: str, seconds: float) -> None:
        """Count so many seconds more to the phase."""
        self._ended[phase] = self._ended.get(phase, 0.0) + seconds

    @property
    def seconds(self) -> dict[str, float]:
        """Of every phase, up to now where it has not ended."""
        now = time.perf_counter()
        going_on = {phase: now - began for phase, (_, began) in self._open.items()}
        names = {**self._ended, **going_on}
        return {name: self._ended.get(name, 0.0) + going_on.get(name, 0.0) for name in names}


class Startup(Phases):
    """The phases before the first episode, several of which overlap: they add up to more than there was."""

    def __init__(self) -> None:
        super().__init__()
        self._kept: dict[str, float] | None = None
        self.first_episode_s: float | None = None  # from the command on

    def episodes_begin(self) -> None:
        """The first episode is about to be played; nothing is counted from here on."""
        if self._kept is None:
            self.first_episode_s, self._kept = since_command(), super().seconds

    @property
    def seconds(self) -> dict[str, float]:
        return super().seconds if self._kept is None else dict(self._kept)
