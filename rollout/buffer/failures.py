"""How many episodes infrastructure fails, and when that is too many."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable

from rollout.wire.trajectory import EndReason

WINDOW = 200  # episodes over which the share of infrastructure failures is judged


_MODULE = re.compile(r"^(?:\w+\.)+(?=\w+:)")  # of the class that a traceback's last line names


class TooManyFailures(RuntimeError):
    """Environments or engines fail so often that training on the rest would be training on a biased rest.

    message: one line, also where the error came from another process and its text is a traceback of there.
    details: the traceback of the last episode that failed; empty where none is known.
    """

    def __init__(self, message: str, details: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.details = details


def cause_of(error: str) -> str:
    """The last line of a stored traceback, which says what an episode failed by; empty where there is none."""
    lines = error.strip().splitlines()
    return _MODULE.sub("", lines[-1]) if lines else ""


class FailureWindow:
    """The last episodes' end reasons and the last error."""

    def __init__(self, allowed_share: float, before: Iterable[tuple[EndReason, str | None]] = ()) -> None:
        self._allowed = allowed_share
        self._recent: deque[bool] = deque(maxlen=WINDOW)  # True: failed
        self._last_error = ""
        self.watch(before)

    def watch(self, episodes: Iterable[tuple[EndReason, str | None]], error: str = "") -> None:
        """Count these episodes; `error` is that of the whole group."""
        self._remember(error)
        for end_reason, episode_error in episodes:
            failed = end_reason is EndReason.FAILED
            self._recent.append(failed)
            if failed:
                self._remember(episode_error or "")

    def require_few(self) -> None:
        """Raises TooManyFailures."""
        # A share of the whole window, so that a bad start of a few episodes does not end a run.
        failed = sum(self._recent)
        if failed > self._allowed * WINDOW:
            last = cause_of(self._last_error) or "none recorded"
            raise TooManyFailures(
                f"{failed} of the last {len(self._recent)} episodes failed by infrastructure, more than "
                f"{self._allowed:.0%} of {WINDOW} (max_failed_share); the last error: {last}",
                self._last_error,
            )

    def _remember(self, error: str) -> None:
        self._last_error = error if error.strip() else self._last_error
