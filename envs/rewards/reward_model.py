"""A reward that a reward model gives, asked of its server: `manta serve-reward FOLDER`.

The key is the playing process's MANTA_REWARD_KEY; it stands in no recipe. A request waits in the environment's own
process or thread, and the server answers those of many episodes together.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Sequence
from urllib.error import HTTPError, URLError
from urllib.request import ProxyHandler, Request, build_opener

from envs.base import Message
from envs.served_model import NoAnswer

KEY = "MANTA_REWARD_KEY"
PATH = "/v1/score"
_OPENER = build_opener(ProxyHandler({}))  # a server of one's own, never behind a proxy
_BUSY = 500  # from here on a status is the server's trouble, and worth another try


def reward_model(
    trajectory: Sequence[Message], *, base_url: str, retries: int = 3, seconds: float = 60.0
) -> float:
    """The score of a conversation: any finite number, larger is better.

    base_url: of the server, such as http://127.0.0.1:8002. retries, seconds: of one question. NoAnswer where the server
    refuses, or does not answer.
    """
    asked = Request(
        base_url.rstrip("/") + PATH,
        json.dumps({"conversations": [list(trajectory)]}).encode(),
        {"Content-Type": "application/json", "Authorization": f"Bearer {os.environ.get(KEY, '')}"},
    )
    for attempt in range(retries + 1):
        try:
            with _OPENER.open(asked, timeout=seconds) as reply:
                return _score(reply.read(), base_url)
        except HTTPError as error:
            trouble = f"status {error.code}: {error.read(200).decode(errors='replace')}"
            if error.code < _BUSY:
                break
        except (URLError, OSError) as error:
            trouble = str(error)
        if attempt < retries:
            time.sleep(min(2.0**attempt, 10.0))
    raise NoAnswer(f"the reward model at {base_url} gave no score: {trouble}")


def _score(body: bytes, base_url: str) -> float:
    try:
        score = float(json.loads(body)["scores"][0])
    except (ValueError, KeyError, IndexError, TypeError):
        raise NoAnswer(f"{base_url} is no reward model's server: it said {body[:80]!r}") from None
    if not math.isfinite(score):
        raise NoAnswer(f"the reward model at {base_url} said {score}")
    return score
