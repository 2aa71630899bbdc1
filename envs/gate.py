"""Semaphores ("gates") that bound concurrency; waiting at one does not count against an episode's time limit.

Slow or stuck calls can hold a gate for minutes. An episode that waits behind them has not used its own time.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from contextvars import ContextVar

_LIMIT: ContextVar[asyncio.Timeout | None] = ContextVar("time limit of the episode", default=None)


@asynccontextmanager
async def time_limit(seconds: float) -> AsyncIterator[asyncio.Timeout]:
    """`asyncio.timeout`, suspended while waiting in `admitted`."""
    async with asyncio.timeout(seconds) as limit:
        token = _LIMIT.set(limit)
        try:
            yield limit
        finally:
            _LIMIT.reset(token)


@asynccontextmanager
async def admitted(gate: asyncio.Semaphore) -> AsyncIterator[None]:
    """Acquire the gate; an enclosing `time_limit` is suspended meanwhile."""
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
