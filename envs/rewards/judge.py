"""A reward that a language model behind an OpenAI-compatible server gives: it reads the answer and says a number."""

from __future__ import annotations

import os
import re
import threading
from functools import lru_cache
from typing import Any

from envs.rewards.answers import last_number

PROMPT = """\
Judge the answer to a task. Say a line of reasons, then a last line "score: N" with a whole number N from 0 (wrong or \
useless) to {most} (right and complete).

Task:
{task}

{reference}Answer:
{completion}
"""
_SCORE = re.compile(r"score\s*:\s*\**\s*([\d.]+)", re.IGNORECASE)
_KEPT = 4096  # judgements kept, so that the same answer is judged once


class JudgeFailed(RuntimeError):
    """The judge gave no score; the episode is lost, never rewarded."""


def judge(
    completion: str,
    truth: Any,
    task: str = "",
    *,
    model: str,
    base_url: str | None = None,
    prompt: str = PROMPT,
    most: int = 10,
    retries: int = 3,
    seconds: float = 60.0,
    at_once: int = 8,
) -> float:
    """The judge's score divided by `most`, in [0, 1].

    prompt: with {task}, {completion}, {reference} and {most}; it must ask for "score: N". base_url: the server;
    none: OPENAI_BASE_URL or OpenAI. retries, seconds: of one question. at_once: questions at a time. The
    key is the playing process's OPENAI_API_KEY; it stands in no recipe. JudgeFailed where no score is given.
    """
    reference = f"Reference answer:\n{truth}\n\n" if truth is not None else ""
    asked = prompt
    for gap, filled in (
        ("most", str(most)),
        ("task", task),
        ("reference", reference),
        ("completion", completion),
    ):
        asked = asked.replace("{" + gap + "}", filled)
    return _judged(asked, model, base_url, most, retries, seconds, at_once)


@lru_cache(maxsize=_KEPT)
def _judged(
    asked: str, model: str, base_url: str | None, most: int, retries: int, seconds: float, at_once: int
) -> float:
    import openai

    with _gate(base_url, at_once):
        try:
            reply = _client(base_url, retries, seconds).chat.completions.create(
                model=model, messages=[{"role": "user", "content": asked}], temperature=0.0
            )
        except openai.OpenAIError as error:
            raise JudgeFailed(f"the judge {model} did not answer: {error}") from error
    text = reply.choices[0].message.content or ""
    said = _SCORE.findall(text)
    score = last_number(said[-1]) if said else None
    if score is None or not 0 <= score <= most:
        raise JudgeFailed(f"the judge {model} said no score from 0 to {most}: {text[-80:]!r}")
    return float(score) / most


@lru_cache(maxsize=8)
def _client(base_url: str | None, retries: int, seconds: float) -> Any:
    import openai

    # A server of one's own asks no key; the client wants to have one.
    key = os.environ.get("OPENAI_API_KEY", "none" if base_url else None)
    return openai.OpenAI(base_url=base_url, api_key=key, max_retries=retries, timeout=seconds)


@lru_cache(maxsize=8)
def _gate(base_url: str | None, at_once: int) -> threading.BoundedSemaphore:
    return threading.BoundedSemaphore(at_once)
