"""Gates bound how much runs at once. Time spent waiting at one counts against no time limit.

Many calls that are slow or stuck may hold a gate for minutes; an episode that waits behind them has not used its time.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from contextvars import ContextVar

_LIMIT: ContextVar[asyncio.Timeout | None] = ContextVar("time limit of the episode", default=None)


@asynccontextmanager
async def time_limit(seconds: float) -> AsyncIterator[asyncio.Timeout]:
    """`asyncio.timeout`, of which the wait in `admitted` uses nothing."""
    async with asyncio.timeout(seconds) as limit:
        token = _LIMIT.set(limit)
        try:
            yield limit
        finally:
            _LIMIT.reset(token)


@asynccontextmanager
async def admitted(gate: asyncio.Semaphore) -> AsyncIterator[None]:
    """Pass the gate; the time limit around it, where there is one, is suspended until then."""
    limit = _LIMIT.get()
    if not gate.locked() or limit is None or limit.expired() or (end := limit.when()) is None:
        await gate.acquire()
    else:
        loop = asyncio.get_running_loop()
        left = end - loop.time()
        limit.reschedule(None)
        await gate.acquire()
        limit.reschedule(loop.time() + left)
    try:
        yield
    finally:
        gate.release()
