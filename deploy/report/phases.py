"""Time of a run: seconds by phase, and the start-up from the command to the first episode."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psutil


def since_command() -> float:
    """Seconds since this process was started."""
    return time.time() - psutil.Process().create_time()


class Phases:
    """Seconds by phase. A phase entered several times at once counts its time once.

    entered: called with the name of each phase that begins.
    """

    def __init__(self, entered: Callable[[str], None] = lambda phase: None) -> None:
        self._tell = entered
        self._ended: dict[str, float] = {}
        self._open: dict[str, tuple[int, float]] = {}  # number of current entries, and the start

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the duration of the block to the phase."""
        entered, began = self._open.get(phase, (0, time.perf_counter()))
        self._open[phase] = entered + 1, began
        self._tell(phase)
        try:
            yield
        finally:
            entered, began = self._open.pop(phase)
            if entered > 1:
                self._open[phase] = entered - 1, began
            else:
                self.add(phase, time.perf_counter() - began)

    def add(self, phase: str, seconds: float) -> None:
        """Add seconds to the phase."""
        self._ended[phase] = self._ended.get(phase, 0.0) + seconds

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of every phase, up to now for open ones."""
        now = time.perf_counter()
        going_on = {phase: now - began for phase, (_, began) in self._open.items()}
        names = {**self._ended, **going_on}
        return {name: self._ended.get(name, 0.0) + going_on.get(name, 0.0) for name in names}


class Startup(Phases):
    """The phases before the first episode. They overlap, so their sum exceeds the elapsed time."""

    def __init__(self) -> None:
        super().__init__()
        self._kept: dict[str, float] | None = None
        self.first_episode_s: float | None = None  # from the command on

    def episodes_begin(self) -> None:
        """End the start-up: the first episode begins, and later times are not counted."""
        if self._kept is None:
            self.first_episode_s, self._kept = since_command(), super().seconds

    @property
    def seconds(self) -> dict[str, float]:
        return super().seconds if self._kept is None else dict(self._kept)
