"""How long something was in use, when many use it at once."""

from __future__ import annotations

import time
from types import TracebackType


class BusyClock:
    """Runs while at least one user is inside: `with clock: await request`."""

    def __init__(self) -> None:
        self._users = 0
        self._since = 0.0
        self._total = 0.0

    @property
    def seconds(self) -> float:
        """Wall time with at least one user, up to now."""
        return self._total + (time.perf_counter() - self._since if self._users else 0.0)

    def __enter__(self) -> None:
        if not self._users:
            self._since = time.perf_counter()
        self._users += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._users -= 1
        if not self._users:
            self._total += time.perf_counter() - self._since
