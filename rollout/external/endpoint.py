"""An OpenAI-compatible server on the loopback interface, through which foreign agents use the policy.

    POST /v1/chat/completions    answered by the policy, streamed or not
    POST /v1/episodes/reward     a `EpisodeVerdict` as JSON, {"reward": 1.0, "success": true}: it ends the episode
    GET  /v1/models[/NAME]       the policy

The API key identifies the episode of a request, and is checked before the body is read. Errors have OpenAI's form: 400
for unsupported requests, 401 for an unknown key, 408 and 413 for a slow or long body, 409 after the episode's end. A
header tells clients not to repeat them.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import socket
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from rollout.external.connection import HUNG_UP, configured, hung_up, read_body
from rollout.external.openai_format import Refused, completion, events, read
from rollout.external.session import EpisodeVerdict, Session, ended

MODEL = "policy"  # name of the model; requests for any other name are served too
_LOOPBACK = "127.0.0.1"
_BACKLOG = 2048
_ENDED_KEPT = 4096  # keys of ended episodes, whose requests get 409
_CLOSE_TIMEOUT_SECONDS = 2
_CLOSING = (401, 408, 413)  # the connection is closed without reading the rest of the body
_IDLE_TIMEOUT_SECONDS = (
    24 * 3600
)  # long, since closing an idle connection races with the client's next request

log = logging.getLogger(__name__)


class Endpoint:
    """The server, on the current event loop and a free port. One endpoint serves all episodes of a worker."""

    def __init__(self) -> None:
        self._sessions: dict[str, Session] = {}
        self._ended: deque[str] = deque(maxlen=_ENDED_KEPT)
        self._ignored: set[str] = set()
        # The socket listens from here on: clients that connect before the server runs are served once it does.
        listener = socket.create_server((_LOOPBACK, 0), backlog=_BACKLOG)
        self.base_url = f"http://{_LOOPBACK}:{listener.getsockname()[1]}/v1"
        self._server = _Server(
            configured(
                self._app(),
                lifespan="off",
                backlog=_BACKLOG,
                timeout_keep_alive=_IDLE_TIMEOUT_SECONDS,
                timeout_graceful_shutdown=_CLOSE_TIMEOUT_SECONDS,
            )
        )
        self._serving = asyncio.create_task(self._server.serve([listener]), name="endpoint")

    def open(self) -> Session:
        """Open a session with a new key."""
        session = Session(f"episode-{secrets.token_hex(16)}")
        self._sessions[session.key] = session
        return session

    def end(self, session: Session) -> None:
        """End a session: refuse its pending and later requests."""
        session.end()
        if self._sessions.pop(session.key, None) is not None:
            self._ended.append(session.key)

    async def close(self) -> None:
        """End every session and the server."""
        for session in list(self._sessions.values()):
            self.end(session)
        self._server.should_exit = True
        await self._serving

    def _app(self) -> Starlette:
        routes = [
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/v1/episodes/reward", self._reward, methods=["POST"]),
            Route("/v1/models", self._models, methods=["GET"]),
            Route("/v1/models/{name:path}", self._model, methods=["GET"]),
        ]
        served = "; ".join(f"{'/'.join(sorted(route.methods or ()))} {route.path}" for route in routes)

        async def elsewhere(request: Request, error: Exception) -> Response:
            assert isinstance(error, HTTPException)
            message = f"{request.method} {request.url.path} does not exist; the routes are {served}"
            return _refusal(Refused(error.status_code, "not_found", message))

        async def refused(request: Request, error: Exception) -> Response:
            assert isinstance(error, Refused)
            return _refusal(error)

        handlers = {HTTPException: elsewhere, Refused: refused, ClientDisconnect: hung_up}
        return Starlette(routes=routes, exception_handlers=handlers)

    async def _chat(self, request: Request) -> Response:
        session = self._session(request)
        asked = read(await read_body(request))
        self._note(asked.ignored)
        call = session.ask(asked)
        gone = asyncio.ensure_future(_disconnected(request))
        either: tuple[asyncio.Future[Any], ...] = (call.answer, gone)
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
        if gone.done():
            call.hung_up = True
            return Response(status_code=HUNG_UP)
        answer = call.answer.result()
        ident, created = f"chatcmpl-{secrets.token_hex(12)}", int(time.time())
        if asked.stream:
            stream = "".join(events(asked, answer, ident, created))
            return Response(stream, media_type="text/event-stream", headers={"cache-control": "no-cache"})
        return JSONResponse(completion(asked, answer, ident, created))

    async def _reward(self, request: Request) -> Response:
        session = self._session(request)
        body = await read_body(request)
        try:
            session.post(EpisodeVerdict.read(body))
        except ValueError as error:
            raise Refused(400, "invalid_request", str(error)) from None
        return JSONResponse({"object": "episode", "ended": True})

    async def _models(self, request: Request) -> Response:
        self._session(request)
        return JSONResponse({"object": "list", "data": [_model(MODEL)]})

    async def _model(self, request: Request) -> Response:
        self._session(request)
        return JSONResponse(_model(request.path_params["name"]))

    def _session(self, request: Request) -> Session:
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        key = key.strip()
        if scheme.lower() == "bearer" and key in self._sessions:
            return self._sessions[key]
        if key in self._ended:
            raise ended()
        raise Refused(
            401,
            "invalid_api_key",
            "the API key belongs to no episode; use the value of OPENAI_API_KEY unchanged",
        )

    def _note(self, ignored: tuple[str, ...]) -> None:
        new = set(ignored) - self._ignored
        if new:
            self._ignored |= new
            named = ", ".join(sorted(new))
            log.warning("a foreign agent's option is ignored: %s; the run's sampling settings apply", named)


class _Server(uvicorn.Server):
    """A uvicorn server that installs no signal handlers: signals are handled by the worker's host."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def _disconnected(request: Request) -> None:
    """Return when the client of a fully read request has disconnected."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "manta"}


def _refusal(error: Refused) -> Response:
    # OpenAI's client would repeat a 409 by default, in vain.
    headers = {"x-should-retry": "false"}
    if error.status in _CLOSING:
        headers["connection"] = "close"
    return JSONResponse(error.body, error.status, headers=headers)
