"""The traceback of a failure in a user's own code; the message on the terminal is one line and names the file.

RUN/failure.log    of the last episode that failed before the run or evaluation ended, or of the user's own part
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rollout.buffer.failures import TooManyFailures
from rollout.wire.own_part import OwnPartError

FAILURE_LOG = "failure.log"


@contextmanager
def failures_kept_in(folder: Path) -> Iterator[None]:
    """Turn TooManyFailures and OwnPartError, also an actor's, into one line that names the file with the traceback."""
    try:
        yield
    except (TooManyFailures, OwnPartError) as failure:
        kind = OwnPartError if isinstance(failure, OwnPartError) else TooManyFailures
        if not failure.details:
            raise kind(failure.message) from None
        log = folder / FAILURE_LOG
        log.write_text(failure.details, encoding="utf-8", errors="backslashreplace")
        raise kind(f"{failure.message}; its traceback: {log}", failure.details) from None
