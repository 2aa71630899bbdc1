"""One verification a node: of processes that map the same bytes, one hashes them, and the others take its verdict."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO

from blake3 import blake3

from rollout.wire.time_limits import MEMORY, limit
from rollout.wire.weights import WeightUpdate

_WAIT_SECONDS = 10.0  # for another process's verdict, and the time that hashing takes at the slowest
_POLL_SECONDS = 0.01
_KEPT = 16  # verdicts: of versions that engines may be loading


class Verdicts:
    """Versions whose bytes a process of this node has verified, in a file that only this node's processes use.

    A verdict is of a handle's memory, which must never be written again, and of the manifest's checksums. The verifying
    process holds the file's lock, which the kernel releases if the process is killed.
    """

    def __init__(self, file: Path, wait_seconds: float = _WAIT_SECONDS) -> None:
        self._file = file
        self._wait_seconds = wait_seconds

    def verified(self, update: WeightUpdate) -> WeightUpdate:
        """Return the version marked as verified. Raises WeightMismatch. Blocks: call it in a thread.

        A verdict that does not come in time is not waited for: this process then hashes the bytes too.
        """
        key = blake3(repr((update.handle, update.manifest.digest)).encode()).hexdigest()
        seconds = limit(self._wait_seconds, update.manifest.nbytes, MEMORY)
        with self._file.open("a+", encoding="utf-8") as file, locked(file, seconds) as alone:
            file.seek(0)
            known = file.read().split()
            if key not in known:
                update.verify()
                if alone:
                    file.truncate(0)
                    file.write("\n".join([*known, key][-_KEPT:]))
        return replace(update, verified=True)


@contextmanager
def locked(file: IO[str], seconds: float) -> Iterator[bool]:
    """Hold the file's lock, or go on without it after some seconds; says which. Closing the file releases it."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() < deadline:
                time.sleep(_POLL_SECONDS)
                continue
            yield False
            return
        yield True
        file.flush()
        return
