"""Limits of a client of the agents' server, before and after its key is known: bytes, seconds, connections.

    connected    the head of a first request comes within HEAD_TIMEOUT_SECONDS, and is at most 64 KiB; else the
    connection ends the head     has the key; without a valid one the body is not read
    the body     comes within BODY_TIMEOUT_SECONDS and has at most MAX_BODY bytes

Beyond `max_connections` the oldest connection without a request is closed for the new one.
"""

from __future__ import annotations

import asyncio
import logging
import resource
import time
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from uvicorn.protocols.http.h11_impl import H11Protocol

from rollout.external.openai_format import Refused, read_json

HEAD_TIMEOUT_SECONDS = 10.0
BODY_TIMEOUT_SECONDS = 30.0
MAX_BODY = 4 << 20  # bytes; a million tokens of text
HUNG_UP = 499  # status for a client that has disconnected


def max_connections() -> int:
    """Concurrent connections: at most half of the files that this process may open."""
    return min(4096, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)


class Connection(H11Protocol):
    """A connection of uvicorn with a time limit for its first request."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._made = time.monotonic()
        self._late = self.loop.call_later(HEAD_TIMEOUT_SECONDS, self._end_silent)
        if len(self.connections) > max_connections():
            silent = [each for each in self.connections if isinstance(each, Connection) and each.is_silent]
            min(
                silent, key=lambda each: each._made
            ).transport.abort()  # `silent` has this connection at least

    def connection_lost(self, error: Exception | None) -> None:
        self._late.cancel()
        super().connection_lost(error)

    @property
    def is_silent(self) -> bool:
        """Whether it has not sent a complete head of a request."""
        return self.cycle is None

    def _end_silent(self) -> None:
        if self.is_silent:
            self.transport.abort()


def configured(app: Starlette, **options: Any) -> uvicorn.Config:
    """uvicorn's configuration of a server with these connections and without a log of requests; options: uvicorn's."""
    return uvicorn.Config(
        app,
        http=Connection,
        ws="none",
        log_config=None,
        log_level=logging.WARNING,
        access_log=False,
        **options,
    )


async def hung_up(request: Request, error: Exception) -> Response:
    """Handle starlette's ClientDisconnect: a body that its client did not finish is no error of the server."""
    return Response(status_code=HUNG_UP)


def bearer_key(request: Request) -> str:
    """The key of "Authorization: Bearer KEY", empty without one."""
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    return given.strip() if scheme.lower() == "bearer" else ""


async def read_body(request: Request) -> Any:
    """Read a request's body as JSON. Raises Refused: 400 for invalid JSON, 408 for a slow body, 413 for a long one."""
    read = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_SECONDS) as clock:
            if int(request.headers.get("content-length", 0)) > MAX_BODY:
                raise _too_long()
            async for piece in request.stream():
                read += piece
                if len(read) > MAX_BODY:
                    raise _too_long()
    except TimeoutError:
        if not clock.expired():
            raise
        raise Refused(
            408, "request_timeout", f"the body did not come within {BODY_TIMEOUT_SECONDS:g} s"
        ) from None
    try:
        return read_json(read)
    except ValueError as error:
        raise Refused(400, "invalid_request", f"the request is not JSON: {error}") from None


def _too_long() -> Refused:
    return Refused(
        413, "request_too_large", f"the body has more than {MAX_BODY} bytes; send a shorter request"
    )
