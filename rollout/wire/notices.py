"""Notices: what goes on without an error and the user should know, such as a request's option that is not heeded.

A notice is logged where it is noticed, as a warning of `envs`, `rollout` or `learner`. `Notices` collects the warnings
of a process for the console, each kind once: an environment that fails in every episode is one notice. The log has all.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from types import TracebackType
from typing import Self

MOST = 100  # notices of a process; what comes later is in its log
MOST_CHARACTERS = 400  # of one notice

_OURS = ("envs", "rollout", "learner")


def kind(text: str) -> str:
    """What two notices share that differ in numbers alone (seeds, seconds, line numbers)."""
    return re.sub(r"\d+", "#", text)


def shortened(text: str) -> str:
    """The first line of a text, at most MOST_CHARACTERS of it."""
    line = text.strip().partition("\n")[0].rstrip().rstrip(":")
    return line if len(line) <= MOST_CHARACTERS else line[: MOST_CHARACTERS - 3] + "..."


def collected() -> Notices:
    """The notices of this process for as long as there is it; its log, standard error, has them as well."""
    logging.basicConfig()
    return Notices().__enter__()


class Notices(logging.Handler):
    """The warnings of this process since it was entered, at most MOST kinds. tell: called with each, in any thread."""

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
        """The notices after the first `count`: whoever has heard so many asks so."""
        return self._texts[count:]

    def emit(self, record: logging.LogRecord) -> None:
        """Collect a record, unless there was one of its kind. Called under the handler's lock."""
        text = shortened(record.getMessage())
        if len(self._texts) < MOST and kind(text) not in self._kinds:
            self._kinds.add(kind(text))
            self._texts.append(text)
            if self._tell is not None:
                self._tell(text)
