"""A server of a reward model on the loopback interface.

    POST /v1/score   {"conversations": [[{"role": "user", "content": "..."}, {"role": "assistant", ...}], ...]}
                     -> {"scores": [0.7, ...]}, 400 for a conversation that cannot be scored
    GET  /health     -> {"status": "ok"}, without a key

Requests that come while others are computed are computed together. The key is checked before a body is read.
"""

from __future__ import annotations

import asyncio
import secrets
import socket
from collections.abc import Sequence
from typing import Any, Protocol

import uvicorn
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from deploy.serving.reward_scorer import Unscorable
from envs.rewards.reward_model import PATH
from rollout.external.connection import bearer_key, configured, hung_up, read_body
from rollout.external.openai_format import Refused

_MOST = 512  # conversations that are computed together
_KEEP_ALIVE_SECONDS = 3600
_CLOSE_TIMEOUT_SECONDS = 2
_Waiting = tuple[Sequence[int], "asyncio.Future[float]"]


class Scorer(Protocol):
    """What scores: `deploy.serving.reward_scorer.RewardScorer`."""

    def tokens(self, conversation: Sequence[dict[str, Any]]) -> list[int]: ...
    def scores(self, rows: Sequence[Sequence[int]]) -> list[float]: ...


class RewardServer:
    """The server of a scorer; requests have "Authorization: Bearer KEY"."""

    def __init__(self, scorer: Scorer, key: str) -> None:
        self._scorer = scorer
        self._key = key
        self._waiting: asyncio.Queue[_Waiting] = asyncio.Queue()
        config = configured(
            self._app(),
            lifespan="off",
            timeout_keep_alive=_KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=_CLOSE_TIMEOUT_SECONDS,
        )
        self._server = uvicorn.Server(config)

    async def serve(self, listener: socket.socket) -> None:
        """Serve on a listening socket until `stop`, or until the process is told to stop (SIGINT, SIGTERM).

        An error of the scorer other than torch's own ends the server, and is raised.
        """
        computing = asyncio.create_task(self._compute(), name="scores")
        computing.add_done_callback(lambda _: self.stop())
        try:
            await self._server.serve(sockets=[listener])
        finally:
            computing.cancel()
            await asyncio.wait([computing])
        if not computing.cancelled():
            computing.result()

    def stop(self) -> None:
        """End `serve`; from any thread."""
        self._server.should_exit = True

    def _app(self) -> Starlette:
        routes = [
            Route(PATH, self._score, methods=["POST"]),
            Route("/health", _health, methods=["GET"]),
        ]
        handlers = {Refused: _refused, ClientDisconnect: hung_up}
        return Starlette(routes=routes, exception_handlers=handlers)

    async def _score(self, request: Request) -> Response:
        if not secrets.compare_digest(bearer_key(request).encode(), self._key.encode()):
            raise Refused(
                401, "invalid_api_key", "wrong key; set MANTA_REWARD_KEY to what the server was given"
            )
        said = await read_body(request)
        asked = said.get("conversations") if isinstance(said, dict) else None
        if not isinstance(asked, list) or not all(isinstance(each, list) for each in asked):
            raise Refused(400, "invalid_request", 'the body is {"conversations": [[messages], ...]}')
        try:
            rows = [await asyncio.to_thread(self._scorer.tokens, each) for each in asked]
        except Unscorable as error:
            raise Refused(400, "invalid_request", str(error)) from None
        answers: list[asyncio.Future[float]] = [asyncio.get_running_loop().create_future() for _ in rows]
        for row, answer in zip(rows, answers, strict=True):
            self._waiting.put_nowait((row, answer))
        try:
            return JSONResponse({"scores": await asyncio.gather(*answers)})
        except RuntimeError as error:
            raise Refused(500, "not_computed", f"the scores were not computed: {error}") from error

    async def _compute(self) -> None:
        """Score what waits, all of it together, for as long as the server runs."""
        while True:
            batch = [await self._waiting.get()]
            while len(batch) < _MOST and not self._waiting.empty():
                batch.append(self._waiting.get_nowait())
            try:
                scores = await asyncio.to_thread(self._scorer.scores, [row for row, _ in batch])
            except RuntimeError as error:  # torch's, such as too little memory: these requests fail with it
                for _, answer in batch:
                    if not answer.done():
                        answer.set_exception(error)
                continue
            for (_, answer), found in zip(batch, scores, strict=True):
                if not answer.done():  # the client has disconnected
                    answer.set_result(found)


async def _health(_: Request) -> Response:
    return JSONResponse({"status": "ok"})


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    return JSONResponse(error.body, error.status)
