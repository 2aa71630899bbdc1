"""The learner's steps, of which the next may be begun before it is asked for."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from rollout.wire.metrics import Row


class StepAhead:
    """`make` makes a step; at most one is under way that was not asked for yet."""

    def __init__(self, make: Callable[[int], Awaitable[Row]]) -> None:
        self._make = make
        self._begun: asyncio.Future[Row] | None = None

    def begin(self, number: int) -> None:
        """Go on with this step, which is asked for next."""
        self._begun = asyncio.ensure_future(self._make(number))
        # A run that is being stopped asks for it no more, and nothing is said of how it ended.
        self._begun.add_done_callback(lambda done: done.cancelled() or done.exception())

    async def made(self, number: int) -> Row:
        """The step's metrics, or what `make` raises."""
        if self._begun is None:
            self.begin(number)
        begun, self._begun = self._begun, None
        assert begun is not None
        return await begun

    def forget(self) -> None:
        """Wait no more for a step that was begun: the learner is lost, or the run is over."""
        if self._begun is not None:
            self._begun.cancel()
            self._begun = None
