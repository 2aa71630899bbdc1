"""The learner's newest version, lent to engines: it stays where they load it from until each has it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from ray.exceptions import RayActorError

from deploy.cluster.ray_actors import awaited
from deploy.config.supervise import PartLost, brief, within
from learner.parallel.ranks import RankLost
from rollout.wire.weights import WeightUpdate

_AGAIN_SECONDS = 0.5  # from a learner that was lost to the next question


class Offers:
    """learner: the actor that offers, once it is up; it may be lost and come back. delta: whether an engine needs the
    difference to the version before, too. lost: called when ranks lost touch with one another. seconds: the limit.
    """

    def __init__(
        self,
        learner: Callable[[], Awaitable[Any]],
        delta: Callable[[], bool],
        lost: Callable[[RankLost], None],
        seconds: float,
    ) -> None:
        self._learner = learner
        self._delta = delta
        self._lost = lost
        self._seconds = seconds

    @asynccontextmanager
    async def borrowed(self) -> AsyncIterator[WeightUpdate]:
        """The newest version for the length of the block. PartLost if none is offered in time."""
        lead, update = await self._offer()
        try:
            yield update
        finally:
            lead.unpin_weights.remote(update.version, update.handle)  # whether it hears this is of no account

    async def _offer(self) -> tuple[Any, WeightUpdate]:
        deadline = time.monotonic() + self._seconds
        while True:
            try:
                lead = await self._learner()
                offered = lead.publish_weights.remote(self._delta())
                return lead, await within(self._seconds, awaited(offered), "the learner's weights")
            except (RayActorError, RankLost) as error:
                if isinstance(error, RankLost):
                    self._lost(error)
                if time.monotonic() > deadline:
                    raise PartLost(
                        f"the learner offered no weights within {self._seconds:g} s: {brief(error)}"
                    ) from error
                await asyncio.sleep(_AGAIN_SECONDS)
