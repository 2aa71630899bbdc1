"""The page on which people judge pairs of episodes, served on the loopback interface.

    GET  /                   the page, with its style and modules; it holds nothing of the run
    GET  /api/next           ?annotator=NAME: the next pair of episodes, or null
    POST /api/judgements     a Judgement: 200 once it is durable, and for one that was sent before

What is under /api needs the key of RUN/labels/key as a bearer token. The page has it from its address, behind the #,
which browsers do not send.
"""

from __future__ import annotations

import secrets
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from random import Random
from typing import Any

import uvicorn
from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from deploy.config.config_errors import ConfigError
from deploy.labels.asking import Pair, next_pair
from deploy.labels.judgements import Judged, Judgement, Labels, agreement, by_pair
from deploy.labels.messages import shown_turns
from deploy.labels.pool import Pool
from deploy.labels.scores import ScoreFile
from rollout.external.connection import bearer_key, configured, hung_up, read_body
from rollout.external.openai_format import Refused
from rollout.wire.trajectory import Trajectory

_CLOSE_TIMEOUT_SECONDS = 2
_PAGE = {
    "/": ("label.html", "text/html"),
    "/label.css": ("label.css", "text/css"),
    "/label.js": ("label.js", "text/javascript"),
    "/outbox.js": ("outbox.js", "text/javascript"),
}
# Text of environments and models is set as text and never as markup; if it were, nothing in it could run or load.
_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}


@dataclass(slots=True)
class LabelPage:
    """The application: what is asked, and where judgements go. All calls are made on one event loop."""

    pool: Pool
    labels: Labels
    overlap: float  # probability of a pair that other annotators have judged
    scores: ScoreFile | None = None  # None, or a file without scores yet: pairs are asked at random
    _shown: dict[str, Pair] = field(default_factory=dict)  # annotator -> the pair on their page

    def app(self) -> Starlette:
        """The routes, with the key as it is stored now."""
        key = self.labels.key()

        def guarded(handler: Any) -> Any:
            async def checked(request: Request) -> Response:
                if not secrets.compare_digest(bearer_key(request).encode(), key.encode()):
                    raise Refused(
                        401, "invalid_key", "open the address that manta label prints, with its key"
                    )
                answer: Response = await handler(request)
                return answer

            return checked

        async def refused(request: Request, error: Exception) -> Response:
            if isinstance(error, Refused):
                return JSONResponse({"error": str(error)}, error.status, headers=_HEADERS)
            assert isinstance(error, HTTPException)
            return JSONResponse({"error": error.detail}, error.status_code, headers=_HEADERS)

        routes = [Route(path, _file(*page), methods=["GET"]) for path, page in _PAGE.items()]
        routes.append(Route("/api/next", guarded(self._next), methods=["GET"]))
        routes.append(Route("/api/judgements", guarded(self._judge), methods=["POST"]))
        handlers = {HTTPException: refused, Refused: refused, ClientDisconnect: hung_up}
        return Starlette(routes=routes, exception_handlers=handlers)

    async def _next(self, request: Request) -> Response:
        annotator = request.query_params.get("annotator", "").strip()
        if not annotator:
            raise Refused(400, "no_annotator", "say who asks: ?annotator=NAME")
        self.pool.refresh()
        if self.scores is not None:
            try:
                self.scores.refresh()
            except ConfigError as error:
                raise Refused(500, "no_scores", str(error)) from None
        judgements = [*self.labels]
        mine = sum(each.annotator == annotator for each in judgements)
        # The same until it is judged: a page that is loaded again shows the same pair.
        rng = Random(f"{annotator}/{mine}")
        pair = next_pair(
            self.pool.pairs,
            {pair: {each.annotator for each in given} for pair, given in by_pair(judgements).items()},
            annotator,
            rng,
            shown={pair for name, pair in self._shown.items() if name != annotator},
            overlap=self.overlap,
            worth=self.scores.worth if self.scores else None,
        )
        if pair:
            self._shown[annotator] = pair
        counts = {
            "mine": mine,
            "all": len(judgements),
            "annotators": len({each.annotator for each in judgements}),
            "agreement": agreement(judgements),
        }
        shown = self._shown_pair(pair, rng) if pair else None
        return JSONResponse({"pair": shown, "counts": counts}, headers=_HEADERS)

    def _shown_pair(self, pair: Pair, rng: Random) -> dict[str, Any]:
        """A pair as the page shows it, on sides of chance. Rewards are not shown: they would be agreed with."""
        places = [pair.first, pair.second]
        rng.shuffle(places)
        episodes = self._episodes(pair, places)
        return {
            "group_id": pair.group_id,
            "attempt": pair.attempt,
            "env_id": episodes[0].task.env_id,
            "seed": episodes[0].task.seed,
            "sides": [{"episode": each.index, "turns": shown_turns(each)} for each in episodes],
        }

    async def _judge(self, request: Request) -> Response:
        try:
            judgement = Judgement.model_validate(await read_body(request))
        except ValidationError as error:
            fault = error.errors()[0]
            where = ".".join(map(str, fault["loc"])) or "the judgement"
            raise Refused(400, "invalid_judgement", f"{where}: {fault['msg']}") from None
        try:
            if not self.labels.has(judgement):
                episodes = self._episodes(judgement.pair, (judgement.left, judgement.right))
                _check(judgement, episodes)
                self.labels.add(judgement, episodes)
        except Judged as error:
            raise Refused(409, "judged", str(error)) from None
        return JSONResponse({"stored": judgement.id}, headers=_HEADERS)

    def _episodes(self, pair: Pair, places: Sequence[int]) -> list[Trajectory]:
        found = [self.pool.episode(pair.group_id, pair.attempt, place) for place in places]
        if pair.first == pair.second or None in found:
            raise Refused(404, "no_pair", f"the run has no pair {tuple(pair)}; load the page again")
        return [episode for episode in found if episode]


def _check(judgement: Judgement, episodes: Sequence[Trajectory]) -> None:
    """Refuse thumbs and corrections of turns that the pair does not have, and two of one turn."""
    turns = {episode.index: len(episode.turns) for episode in episodes}
    for marks in (judgement.thumbs, judgement.corrections):
        marked = [(mark.episode, mark.turn) for mark in marks]
        if any(turn >= turns.get(episode, 0) for episode, turn in marked) or len({*marked}) < len(marked):
            raise Refused(400, "no_turn", "thumbs and corrections are of turns of the pair, one of each turn")


def _file(name: str, media_type: str) -> Any:
    content = files("deploy.labels").joinpath("page", name).read_bytes()

    async def send(request: Request) -> Response:
        return Response(content, media_type=media_type, headers=_HEADERS)

    return send


async def serve(page: LabelPage, listener: socket.socket) -> None:
    """Serve on a listening socket until the process is told to stop (SIGINT, SIGTERM)."""
    config = configured(page.app(), lifespan="off", timeout_graceful_shutdown=_CLOSE_TIMEOUT_SECONDS)
    await uvicorn.Server(config).serve(sockets=[listener])
