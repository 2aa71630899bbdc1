"""The whole traceback of what failed an episode, kept where the one line on the terminal says.

RUN/failure.log    of the last episode that failed before the run, or the evaluation, was given up
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rollout.buffer.failures import TooManyFailures

FAILURE_LOG = "failure.log"


@contextmanager
def failures_kept_in(folder: Path) -> Iterator[None]:
    """TooManyFailures, from wherever it comes, becomes one line that names the file with its details."""
    try:
        yield
    except TooManyFailures as failure:
        if not failure.details:
            raise TooManyFailures(failure.message) from None
        log = folder / FAILURE_LOG
        log.write_text(failure.details, encoding="utf-8", errors="backslashreplace")
        raise TooManyFailures(f"{failure.message}; its traceback: {log}", failure.details) from None
