"""Control of a running job through small files in its run folder, which is shared by all nodes and needs no port.

RUN/driver.lock    locked by the driver while it runs; holds its host and pid
RUN/wanted.json    the request of `manta scale`
RUN/roster.json    every part of the run: name, state, host, pid, log
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from deploy.config.config_errors import ConfigError
from deploy.config.run_folder import LOCK, read_json, writing
from rollout.wire.whole_file import replace_file

WANTED, ROSTER = "wanted.json", "roster.json"
_WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # of a file system
MOST_WORKERS = 1024  # limit of one driver


@contextmanager
def driving(folder: Path) -> Iterator[None]:
    """Hold the lock of a run's only driver; ConfigError if another process holds it. The system frees it at any end."""
    with writing(folder):
        lock_file = (folder / LOCK).open("a+", encoding="utf-8")
    with lock_file as lock:
        try:
            _lock(lock, fcntl.LOCK_EX)
        except BlockingIOError:
            lock.seek(0)
            raise ConfigError(
                f"{folder} is being driven already ({lock.read().strip()}): stop that one first"
            ) from None
        if not _is_file_of(lock.fileno(), folder / LOCK):
            raise ConfigError(f"{folder} was just removed by another process; run the command again")
        lock.truncate(0)
        lock.write(f"pid {os.getpid()} on {socket.gethostname()}")
        lock.flush()
        (folder / WANTED).unlink(missing_ok=True)  # a request to an earlier driver
        yield


def _lock(file: TextIO, kind: int) -> None:
    """Lock a file, or raise BlockingIOError. Where a file system has no locks, a second run is fenced by its copy."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _WITHOUT_LOCKS:
            raise


def _is_file_of(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def is_driven(folder: Path) -> bool:
    """Whether a driver holds the run right now."""
    try:
        with (folder / LOCK).open("r", encoding="utf-8") as lock:
            _lock(lock, fcntl.LOCK_SH)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def ask_workers(folder: Path, workers: int) -> None:
    """Ask the driver of a run for a number of rollout workers. ConfigError for a number out of range."""
    if not 1 <= workers <= MOST_WORKERS:
        raise ConfigError(f"--workers {workers}: use a number from 1 to {MOST_WORKERS}")
    if not is_driven(folder):
        raise ConfigError(
            f"{folder}: no driver is running, so there is nothing to scale; resume the run first"
        )
    _replace(folder / WANTED, {"workers": workers})


def wanted_workers(folder: Path) -> int | None:
    """The last requested number of workers, or None. ConfigError for an invalid file."""
    asked = _read(folder / WANTED)
    if asked is None:
        return None
    workers = asked.get("workers") if isinstance(asked, dict) else None
    if type(workers) is not int or not 1 <= workers <= MOST_WORKERS:
        raise ConfigError(f'{folder / WANTED}: must hold {{"workers": 1..{MOST_WORKERS}}}; use manta scale')
    return workers


def write_roster(folder: Path, roster: list[dict[str, Any]]) -> None:
    _replace(folder / ROSTER, roster)


def read_roster(folder: Path) -> list[dict[str, Any]]:
    """The stored roster; empty before the run's parts have started."""
    return _read(folder / ROSTER) or []


def _read(path: Path) -> Any:
    return read_json(path) if path.exists() else None


def _replace(path: Path, content: Any) -> None:
    replace_file(path, json.dumps(content, indent=1), several=True)
