"""A server of a reward model on the loopback interface.

    POST /v1/score   {"conversations": [[{"role": "user", "content": "..."}, {"role": "assistant", ...}], ...]}
                     -> {"scores": [0.7, ...]}, 400 for a conversation that cannot be scored
    GET  /health     -> {"status": "ok"}, without a key

Requests that come while others are computed are computed together. The key is checked before a body is read.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, Protocol

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from deploy.serving.reward_scorer import Unscorable
from envs.rewards.reward_model import PATH
from rollout.external.connection import bearer_key, configured, read_body
from rollout.external.openai_format import Refused

_MOST = 512  # conversations that are computed together
_Waiting = tuple[Sequence[int], "asyncio.Future[float]"]


class Scorer(Protocol):
    """What scores: `deploy.serving.reward_scorer.RewardScorer`."""

    def tokens(self, conversation: Sequence[dict[str, Any]]) -> list[int]: ...
    def scores(self, rows: Sequence[Sequence[int]]) -> list[float]: ...


def reward_app(scorer: Scorer, key: str) -> Starlette:
    """The application; requests have "Authorization: Bearer KEY"."""
    waiting: asyncio.Queue[_Waiting] = asyncio.Queue()

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        computing = asyncio.create_task(_compute(scorer, waiting), name="scores")
        try:
            yield
        finally:
            computing.cancel()

    async def score(request: Request) -> Response:
        _require_key(request, key)
        said = await read_body(request)
        asked = said.get("conversations") if isinstance(said, dict) else None
        if not isinstance(asked, list) or not all(isinstance(each, list) for each in asked):
            raise Refused(400, "invalid_request", 'the body is {"conversations": [[messages], ...]}')
        try:
            rows = [await asyncio.to_thread(scorer.tokens, each) for each in asked]
        except Unscorable as error:
            raise Refused(400, "invalid_request", str(error)) from None
        answers: list[asyncio.Future[float]] = [asyncio.get_running_loop().create_future() for _ in rows]
        for row, answer in zip(rows, answers, strict=True):
            waiting.put_nowait((row, answer))
        return JSONResponse({"scores": await asyncio.gather(*answers)})

    async def health(_: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def refused(_: Request, error: Exception) -> Response:
        assert isinstance(error, Refused)
        return JSONResponse(error.body, error.status)

    routes = [Route(PATH, score, methods=["POST"]), Route("/health", health, methods=["GET"])]
    return Starlette(routes=routes, exception_handlers={Refused: refused}, lifespan=lifespan)


async def _compute(scorer: Scorer, waiting: asyncio.Queue[_Waiting]) -> None:
    """Score what waits, all of it together, for as long as the server lives."""
    while True:
        batch = [await waiting.get()]
        while len(batch) < _MOST and not waiting.empty():
            batch.append(waiting.get_nowait())
        try:
            scores = await asyncio.to_thread(scorer.scores, [row for row, _ in batch])
        except Exception as error:  # foreign code: these requests fail with it, and the server goes on
            for _, answer in batch:
                answer.set_exception(error)
            continue
        for (_, answer), found in zip(batch, scores, strict=True):
            if not answer.done():  # the client is gone
                answer.set_result(found)


def _require_key(request: Request, key: str) -> None:
    if not secrets.compare_digest(bearer_key(request).encode(), key.encode()):
        raise Refused(401, "invalid_api_key", "wrong key; set MANTA_REWARD_KEY to what the server was given")


def reward_server(scorer: Scorer, key: str, port: int) -> uvicorn.Server:
    """The server on 127.0.0.1, to be run; it ends at an interrupt."""
    config = configured(reward_app(scorer, key), host="127.0.0.1", port=port, timeout_keep_alive=3600)
    return uvicorn.Server(config)
