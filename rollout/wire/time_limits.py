"""Time limits that grow with the bytes of a wait: a limit made for a tiny model would end a run of a large one.

A limit is the recipe's option, for all that does not depend on the model, and the bytes at the slowest rate that is
not yet a fault. The rates are assumptions: a tenth of what such parts usually do.
"""

from __future__ import annotations

DISK = 100e6  # bytes/s of a file system that nodes share, read or written
NETWORK = 200e6  # between nodes, while several engines pull the same version
MEMORY = 500e6  # gathered from ranks, cast, copied, hashed or loaded on one node


def limit(seconds: float, nbytes: float, rate: float) -> float:
    """Seconds that a wait may take: `seconds`, and `nbytes` at `rate` bytes/s."""
    return seconds + nbytes / rate
