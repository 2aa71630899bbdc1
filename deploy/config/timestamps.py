"""Points in time as a run's files and `manta status` say them."""

from __future__ import annotations

import time


def timestamp(seconds: float | None = None) -> str:
    """ISO 8601 in local time with its offset, to the second. seconds: since the epoch; None: now."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(seconds))
