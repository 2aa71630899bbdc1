"""Share of episodes that fail by infrastructure, and the limit that stops a run."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable

from rollout.wire.trajectory import EndReason

WINDOW = 200  # episodes over which the share of infrastructure failures is computed

_MODULE = re.compile(r"^(?:\w+\.)+(?=\w+:)")  # of the class that a traceback's last line names


class TooManyFailures(RuntimeError):
    """Environments or engines fail so often that the remaining episodes would be a biased sample.

    message: one line, also for an error of another process, whose text is a traceback.
    details: traceback of the last failed episode; empty if none is known.
    """

    def __init__(self, message: str, details: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.details = details


def cause_of(error: str) -> str:
    """Last line of a stored traceback, without the module's name; empty if there is none."""
    lines = error.strip().splitlines()
    return _MODULE.sub("", lines[-1]) if lines else ""


class FailureWindow:
    """End reasons of the last WINDOW episodes, and the last error."""

    def __init__(self, allowed_share: float, before: Iterable[tuple[EndReason, str | None]] = ()) -> None:
        self._allowed = allowed_share
        self._recent: deque[bool] = deque(maxlen=WINDOW)  # True: failed
        self._last_error = ""
        self.count(before)

    def count(self, episodes: Iterable[tuple[EndReason, str | None]], error: str = "") -> None:
        """Count these episodes. error: of their whole group."""
        self._remember(error)
        for end_reason, episode_error in episodes:
            failed = end_reason is EndReason.FAILED
            self._recent.append(failed)
            if failed:
                self._remember(episode_error or "")

    def require_below_limit(self) -> None:
        """Raise TooManyFailures above the allowed share."""
        # The share is of the whole window, so that a few failures at the start do not end a run.
        failed = sum(self._recent)
        if failed > self._allowed * WINDOW:
            last = cause_of(self._last_error) or "none recorded"
            raise TooManyFailures(
                f"{failed} of the last {len(self._recent)} episodes failed by infrastructure, more than "
                f"{self._allowed:.0%} of {WINDOW} (buffer.max_failed_share); the last error: {last}",
                self._last_error,
            )

    def _remember(self, error: str) -> None:
        self._last_error = error if error.strip() else self._last_error
