"""A user played by a model behind a server: it answers the agent until it has what it wants or its turns are spent.

user = { model = "...", base_url = "http://127.0.0.1:8001/v1", turns = 6 }
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from envs.base import Message
from envs.datasets.files import Row
from envs.datasets.schema import fill
from envs.served_model import ServedModel

DONE = "[DONE]"  # said by the user when it has no further message
PROMPT = f"""\
You play a user who talks to an assistant. Say only what that user says next, in one or two sentences; never answer \
for the assistant. When the assistant has given you what you wanted, or cannot, say only {DONE}.
"""
_OTHER_SIDE = {"user": "assistant", "assistant": "user"}


class SimulatedUser:
    """model, base_url, retries, seconds, at_once: as of `ServedModel`.

    turns: messages that the user says at most after the first. prompt: its directions, with {column} of the row and
    [DONE], which it says to end. ValueError for wrong options.
    """

    def __init__(self, model: str, *, turns: int = 6, prompt: str = PROMPT, **asked: Any) -> None:
        if turns < 1:
            raise ValueError(f"user: turns={turns} lets the user say nothing; use 1 or more")
        if DONE not in prompt:
            raise ValueError(f"user: the prompt has to ask for {DONE} where the user has no further message")
        self._model = ServedModel(model, **asked)
        self._prompt = prompt
        self.turns = turns

    def next_message(self, talk: Sequence[Message], row: Row, seed: int) -> str | None:
        """What the user says after all that was said; None when it has no further message. Raises NoAnswer."""
        heard = [each | {"role": _OTHER_SIDE[each["role"]]} for each in talk if each["role"] in _OTHER_SIDE]
        directions = {"role": "system", "content": fill(self._prompt, row)}
        said = self._model.answer([directions, *heard], seed=seed).strip()
        return None if DONE in said or not said else said
