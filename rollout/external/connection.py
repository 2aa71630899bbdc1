"""What a client may cost the agents' server, before its key is known and after: bytes, seconds, connections.

    connected    the head of a first request comes within HEAD_SECONDS, and is at most 64 KiB; else the connection ends
    the head     says the key; without a valid one the body is not read
    the body     comes within BODY_SECONDS and has at most MAX_BODY bytes

Beyond `max_connections` the oldest connection that has sent no request gives its place to the new one.
"""

from __future__ import annotations

import asyncio
import resource
import time
from typing import Any

from starlette.requests import Request
from uvicorn.protocols.http.h11_impl import H11Protocol

from rollout.external.openai_format import Refused, read_json

HEAD_SECONDS = 10.0
BODY_SECONDS = 30.0
MAX_BODY = 4 << 20  # bytes; a million tokens of text


def max_connections() -> int:
    """Connections at a time: at most half the files that this process may open."""
    return min(4096, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)


class Connection(H11Protocol):
    """A connection to uvicorn that does not wait for ever for its first request."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._made = time.monotonic()
        self._late = self.loop.call_later(HEAD_SECONDS, self._end_silent)
        if len(self.connections) > max_connections():
            silent = [each for each in self.connections if isinstance(each, Connection) and each.is_silent]
            min(silent, key=lambda each: each._made).transport.abort()  # this one is among them

    def connection_lost(self, error: Exception | None) -> None:
        self._late.cancel()
        super().connection_lost(error)

    @property
    def is_silent(self) -> bool:
        """Whether it has sent no whole head of a request."""
        return self.cycle is None

    def _end_silent(self) -> None:
        if self.is_silent:
            self.transport.abort()


async def read_body(request: Request) -> Any:
    """A request's body as JSON. Raises Refused: 400 for what is none, 408 for a slow one, 413 for a long one."""
    read = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS) as clock:
            if int(request.headers.get("content-length", 0)) > MAX_BODY:
                raise _too_long()
            async for piece in request.stream():
                read += piece
                if len(read) > MAX_BODY:
                    raise _too_long()
    except TimeoutError:
        if not clock.expired():
            raise
        raise Refused(408, "request_timeout", f"the body did not come within {BODY_SECONDS:g} s") from None
    try:
        return read_json(read)
    except ValueError as error:
        raise Refused(400, "invalid_request", f"the request is no JSON: {error}") from None


def _too_long() -> Refused:
    return Refused(413, "request_too_large", f"a request's body may have {MAX_BODY} bytes; ask for less")
