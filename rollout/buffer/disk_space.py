"""Room on the disk: what is free, what is wanted, and which errors mean that there is none."""

from __future__ import annotations

import errno
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

_MIB = 2**20


def free_bytes(folder: Path) -> int:
    """What the disk of this folder has left."""
    return shutil.disk_usage(folder).free


class NoRoom(OSError):
    """The disk has less left than is wanted."""


class Room:
    """`probe` says how many bytes are free; a test says it otherwise."""

    def __init__(self, folder: Path, min_free_mib: int, probe: Callable[[Path], int] = free_bytes) -> None:
        self._folder = folder
        self._min_free_mib = min_free_mib
        self._probe = probe

    def require(self) -> None:
        """Raises NoRoom."""
        if self._probe(self._folder) < self._min_free_mib * _MIB:
            raise NoRoom(errno.ENOSPC, self._say("too little room"))

    def lack(self, error: OSError | sqlite3.Error) -> str | None:
        """What to tell people where this error means that the disk has no room; None where it means another thing."""
        if isinstance(error, NoRoom):
            return str(error.strerror)
        if isinstance(error, sqlite3.Error):
            return self._say("the disk is full") if error.sqlite_errorcode == sqlite3.SQLITE_FULL else None
        if error.errno == errno.ENOSPC:
            return self._say("the disk is full")
        return self._say("the quota is used up") if error.errno == errno.EDQUOT else None

    def _say(self, what: str) -> str:
        free = self._probe(self._folder) / _MIB
        return f"{what} at {self._folder}: {free:.0f} MiB free, {self._min_free_mib} wanted (buffer.min_free_mib)"
