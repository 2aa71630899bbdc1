"""Whether a file system can hold a ledger in use.

SQLite's write-ahead log needs locks between processes and memory that they share
(https://www.sqlite.org/wal.html). Network file systems promise neither: some refuse, some pretend. Their types are
known by number, and what a type does not tell is tried.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import sqlite3
import struct
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TextIO

from rollout.buffer.ledger_checks import LedgerError

# f_type of statfs(2), from linux/magic.h and the file systems' own headers.
_NETWORK = {
    0x6969: "NFS",
    0x517B: "SMB",
    0xFE534D42: "SMB",
    0xFF534D42: "CIFS",
    0x0BD00BD0: "Lustre",
    0x47504653: "GPFS",
    0x19830326: "BeeGFS",
    0x00C36400: "CephFS",
    0x01021997: "9p",
    0x65735546: "FUSE",
    0x5346414F: "AFS",
    0x6B414653: "AFS",
    0x73757245: "Coda",
    0x01161970: "GFS2",
    0x7461636F: "OCFS2",
    0xAAD7AAEA: "PanFS",
    0x786F4256: "VirtualBox shared folder",
}
_STATFS_BYTES = 256  # more than the structure has, whose first word is f_type
_POLL_SECONDS = 0.1
_FLOCK = struct.Struct("hhqqi4x")  # struct flock: type, whence, start, length, pid


def flaw_of(folder: Path) -> str:
    """Why a ledger must not be in use in this folder, in a few words; empty if it may. OSError for a missing folder."""
    if (kind := _NETWORK.get(_type_of(folder))) is not None:
        return f"it is on a network file system ({kind})"
    with tempfile.TemporaryDirectory(prefix=".manta-probe-", dir=folder) as probe:
        return _locks(Path(probe) / "locks") or _memory(Path(probe) / "memory") or _log(Path(probe) / "log")


@contextmanager
def sole_user(lock: Path, wait_seconds: float = 0.0) -> Iterator[None]:
    """Hold this lock file for the block; the system frees it at any end of the process.

    LedgerError if another process holds it, and still does after `wait_seconds`: one that was killed may be ending.
    """
    deadline = time.monotonic() + wait_seconds
    with lock.open("a+", encoding="utf-8") as file:
        while not _locked(file):
            if time.monotonic() > deadline:
                file.seek(0)
                raise LedgerError(
                    f"{lock.parent}: another replay buffer is using it ({file.read().strip()}); stop that run first"
                )
            time.sleep(_POLL_SECONDS)
        file.truncate(0)
        file.write(f"pid {os.getpid()}")
        file.flush()
        yield


def _locked(file: TextIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _type_of(folder: Path) -> int:
    buffer = ctypes.create_string_buffer(_STATFS_BYTES)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.statfs(os.fsencode(folder), buffer) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(folder))
    return int(ctypes.c_ulong.from_buffer(buffer).value) & 0xFFFFFFFF


def _locks(path: Path) -> str:
    """Whether two open files exclude each other, by either kind of lock."""
    whole_file = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    with path.open("wb") as one, path.open("r+b") as other:
        try:
            fcntl.fcntl(one, fcntl.F_OFD_SETLK, whole_file)
            fcntl.flock(one, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return f"its files cannot be locked ({error.strerror})"
        for lock in (
            lambda: fcntl.fcntl(other, fcntl.F_OFD_SETLK, whole_file),
            lambda: fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB),
        ):
            try:
                lock()
            except OSError as error:
                if error.errno in (errno.EAGAIN, errno.EACCES):
                    continue
            return "a lock on its files does not exclude a second one"
    return ""


def _memory(path: Path) -> str:
    """Whether two mappings of a file, and the file itself, are the same bytes."""
    path.write_bytes(bytes(mmap.PAGESIZE))
    try:
        with (
            path.open("r+b") as one,
            path.open("r+b") as other,
            mmap.mmap(one.fileno(), mmap.PAGESIZE) as here,
            mmap.mmap(other.fileno(), mmap.PAGESIZE) as there,
        ):
            here[:4] = b"here"
            if there[:4] == b"here" == os.pread(other.fileno(), 4, 0):
                return ""
    except OSError as error:
        return f"its files cannot be shared memory ({error.strerror})"
    return "what one process writes to a file in memory another does not read"


def _log(path: Path) -> str:
    """Whether SQLite itself, with a write-ahead log, shows one connection what another wrote."""
    try:
        with closing(sqlite3.connect(path)) as one, closing(sqlite3.connect(path)) as other:
            (mode,) = one.execute("PRAGMA journal_mode=WAL").fetchone()
            if mode != "wal":
                return "SQLite keeps no write-ahead log there"
            one.executescript("CREATE TABLE t (x); INSERT INTO t VALUES (1);")
            seen = other.execute("SELECT x FROM t").fetchall()
    except sqlite3.Error as error:
        return f"SQLite cannot use it ({error})"
    return "" if seen == [(1,)] else "SQLite does not read there what it wrote"
