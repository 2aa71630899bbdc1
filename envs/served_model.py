"""A model behind an OpenAI-compatible server, asked for one answer: a judge, a simulated user.

The key is the playing process's OPENAI_API_KEY; it stands in no recipe. Without a base_url the server is
OPENAI_BASE_URL or OpenAI.
"""

from __future__ import annotations

import importlib.util
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from envs.base import Message


class NoAnswer(RuntimeError):
    """The server gave no answer; the episode is lost, and never counted as a failure of the policy."""


@dataclass(frozen=True, slots=True)
class ServedModel:
    """Which model to ask, and how patiently.

    model: its name at the server. retries, seconds: of one question. at_once: questions that one process asks at a
    time. ValueError where the package openai is missing.
    """

    model: str
    base_url: str | None = None
    retries: int = 3
    seconds: float = 60.0
    at_once: int = 8

    def __post_init__(self) -> None:
        if importlib.util.find_spec("openai") is None:
            raise ValueError(f"asking {self.model} needs the package openai: pip install 'manta-rl[judge]'")

    def answer(self, messages: Sequence[Message], **sampling: Any) -> str:
        """The answer to a conversation. sampling: temperature, seed, max_tokens. Raises NoAnswer."""
        import openai

        with _gate(self.base_url, self.at_once):
            try:
                reply = _client(self.base_url, self.retries, self.seconds).chat.completions.create(
                    model=self.model, messages=list(messages), **sampling
                )
            except openai.OpenAIError as error:
                raise NoAnswer(f"the model {self.model} did not answer: {error}") from error
        return reply.choices[0].message.content or ""


@lru_cache(maxsize=8)
def _client(base_url: str | None, retries: int, seconds: float) -> Any:
    import openai

    return openai.OpenAI(**client_options(base_url, retries, seconds))


def client_options(base_url: str | None, retries: int, seconds: float) -> dict[str, Any]:
    """Arguments of the package's clients. A server of one's own asks no key, but the client wants to have one."""
    key = os.environ.get("OPENAI_API_KEY", "none" if base_url else None)
    return {"base_url": base_url, "api_key": key, "max_retries": retries, "timeout": seconds}


@lru_cache(maxsize=8)
def _gate(base_url: str | None, at_once: int) -> threading.BoundedSemaphore:
    return threading.BoundedSemaphore(at_once)
