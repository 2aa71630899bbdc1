"""An opponent behind an OpenAI-compatible server: a past version of the policy, or any other model.

    manta export RUN MODEL --version 40
    vllm serve MODEL --port 8001                  -> opponent = "http://127.0.0.1:8001/v1"

The observation of the opponent's seat is the only message of a request to `/chat/completions`, as with
agent.memory="last"; the server's first model answers. If the game lists legal moves, an answer that is not one of them
is replaced by a random legal move, so that games are not won by unparsable answers.

Seeds are sent, but servers rarely give reproducible answers: environments with such an opponent are nondeterministic. A
request blocks; run replicas in processes (env.host.where = "process"), or all episodes of a worker wait for it.
"""

from __future__ import annotations

import http.client
import json
import os
import urllib.error
import urllib.request
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np

SECONDS = 60.0  # limit for an answer
MAX_TOKENS = 64
_SHOWN = 200  # characters of a server's answer in an error


class OpponentFailed(RuntimeError):
    """A server did not answer, or not with a completion."""


class PolicyOpponent:
    """Plays with the first model at an OpenAI-compatible endpoint. url: including /v1. The key is OPENAI_API_KEY."""

    def __init__(self, url: str, seconds: float = SECONDS) -> None:
        self._url = url.rstrip("/")
        self._seconds = seconds

    def __call__(self, observation: str, moves: list[str] | None, rng: np.random.Generator) -> str:
        asked = {
            "model": self._model,
            "messages": [{"role": "user", "content": observation}],
            "max_tokens": MAX_TOKENS,
            "seed": int(rng.integers(2**31)),
        }
        move = self._read("/chat/completions", "choices", 0, "message", "content", body=asked).strip()
        return move if not moves or move in moves else moves[rng.integers(len(moves))]

    @cached_property
    def _model(self) -> str:
        return self._read("/models", "data", 0, "id")

    def _read(self, path: str, *path_in_json: str | int, body: Mapping[str, Any] | None = None) -> str:
        """The text at a path in the JSON answer. Raises OpponentFailed."""
        request = urllib.request.Request(
            self._url + path,
            None if body is None else json.dumps(body).encode(),
            {
                "Content-Type": "application/json",
                "Authorization": f"Bearer {os.environ.get('OPENAI_API_KEY', '')}",
            },
        )
        try:
            with urllib.request.urlopen(request, timeout=self._seconds) as answer:
                answered = answer.read()
            found = json.loads(answered)
            for step in path_in_json:
                found = found[step]
        except urllib.error.HTTPError as error:
            shown = error.read()[:_SHOWN].decode(errors="replace")
            raise OpponentFailed(
                f"the opponent at {request.full_url} answered {error.code}: {shown}"
            ) from error
        except (OSError, http.client.HTTPException) as error:
            raise OpponentFailed(
                f"the opponent at {request.full_url} did not answer within {self._seconds:g} s: {error}"
            ) from error
        except (ValueError, LookupError, TypeError) as error:
            shown = answered[:_SHOWN].decode(errors="replace")
            raise OpponentFailed(f"the opponent at {request.full_url} sent no completion: {shown}") from error
        return "" if found is None else str(found)
