"""A reward that a language model behind an OpenAI-compatible server gives: it reads the answer and says a number."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

from envs.rewards.answers import last_number
from envs.served_model import NoAnswer, ServedModel

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


def judge(
    completion: str,
    truth: Any,
    task: str = "",
    conversation: str = "",
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

    task: the message that was answered. conversation: all that was said. prompt: with {task}, {completion},
    {conversation}, {reference} and {most}; it must ask for "score: N". base_url, retries, seconds, at_once: as of
    `ServedModel`. NoAnswer where no score is given.
    """
    gaps = {
        "task": task,
        "completion": completion,
        "conversation": conversation,
        "reference": f"Reference answer:\n{truth}\n\n" if truth is not None else "",
        "most": str(most),
    }
    asked = re.sub("{(" + "|".join(gaps) + ")}", lambda gap: gaps[gap[1]], prompt)
    return _judged(ServedModel(model, base_url, retries, seconds, at_once), asked, most)


@lru_cache(maxsize=_KEPT)
def _judged(server: ServedModel, asked: str, most: int) -> float:
    text = server.answer([{"role": "user", "content": asked}], temperature=0.0)
    said = _SCORE.findall(text)
    score = last_number(said[-1]) if said else None
    if score is None or not 0 <= score <= most:
        raise NoAnswer(f"the judge {server.model} said no score from 0 to {most}: {text[-80:]!r}")
    return float(score) / most
