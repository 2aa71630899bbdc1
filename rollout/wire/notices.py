"""Notices: conditions that are no error but that the user should know, such as an ignored option of a request.

A notice is a warning logged by `envs`, `rollout` or `learner`. `Notices` collects the warnings of a process for the
console, each kind once: an environment that fails in every episode gives one notice. The log has all of them.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from types import TracebackType
from typing import Self

MOST = 100  # notices of a process; later ones are in its log only
MOST_CHARACTERS = 400  # of one notice

_OURS = ("envs", "rollout", "learner")


def kind(text: str) -> str:
    """Key of a notice: its text without the numbers (seeds, seconds, line numbers)."""
    return re.sub(r"\d+", "#", text)


def shortened(text: str) -> str:
    """First line of a text, at most MOST_CHARACTERS of it."""
    line = text.strip().partition("\n")[0].rstrip().rstrip(":")
    return line if len(line) <= MOST_CHARACTERS else line[: MOST_CHARACTERS - 3] + "..."


def collected() -> Notices:
    """Collect the notices of this process until it ends; its log, standard error, has them too."""
    logging.basicConfig()
    return Notices().__enter__()


class Notices(logging.Handler):
    """Warnings of this process since `__enter__`, at most MOST kinds. tell: called with each, in any thread."""

    def __init__(self, tell: Callable[[str], None] | None = None) -> None:
        super().__init__(logging.WARNING)
        self._tell = tell
        self._texts: list[str] = []
        self._kinds: set[str] = set()

    def __enter__(self) -> Self:
        for name in _OURS:
            logging.getLogger(name).addHandler(self)
        return self

    def __exit__(
        self, type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name in _OURS:
            logging.getLogger(name).removeHandler(self)

    def since(self, count: int) -> list[str]:
        """Notices after the first `count`, which the caller has already."""
        return self._texts[count:]

    def emit(self, record: logging.LogRecord) -> None:
        """Collect a record unless one of its kind was collected. Called under the handler's lock."""
        text = shortened(record.getMessage())
        if len(self._texts) < MOST and kind(text) not in self._kinds:
            self._kinds.add(kind(text))
            self._texts.append(text)
            if self._tell is not None:
                self._tell(text)
