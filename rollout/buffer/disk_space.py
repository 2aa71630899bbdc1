"""Free disk space of a run: how much is required, and which errors mean that a run waits for storage."""

from __future__ import annotations

import errno
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

_MIB = 2**20


def free_bytes(folder: Path) -> int:
    """Free bytes on the disk of this folder."""
    return shutil.disk_usage(folder).free


class OutOfDiskSpace(OSError):
    """The disk has less free space than buffer.min_free_mib."""


class CopyUnreachable(OSError):
    """The storage of the copy does not answer, or takes nothing; the call may be repeated."""


class DiskSpace:
    """Free space on a folder's disk. probe: returns the free bytes; tests pass their own."""

    def __init__(self, folder: Path, min_free_mib: int, probe: Callable[[Path], int] = free_bytes) -> None:
        self._folder = folder
        self._min_free_mib = min_free_mib
        self._probe = probe

    def require(self) -> None:
        """Raise OutOfDiskSpace below the required free space."""
        if self._probe(self._folder) < self._min_free_mib * _MIB:
            raise OutOfDiskSpace(errno.ENOSPC, self._say("too little disk space"))

    def lack(self, error: OSError | sqlite3.Error) -> str | None:
        """Return a message if this error means that the disk is full or the copy out of reach, else None."""
        if isinstance(error, OutOfDiskSpace | CopyUnreachable):
            return str(error.strerror)
        if isinstance(error, sqlite3.Error):
            return self._say("the disk is full") if error.sqlite_errorcode == sqlite3.SQLITE_FULL else None
        if error.errno == errno.ENOSPC:
            return self._say("the disk is full")
        return self._say("the quota is used up") if error.errno == errno.EDQUOT else None

    def _say(self, what: str) -> str:
        free = self._probe(self._folder) / _MIB
        return f"{what} at {self._folder}: {free:.0f} MiB free, {self._min_free_mib} required (buffer.min_free_mib)"
