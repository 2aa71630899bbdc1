"""How a running job is spoken to: small files in its run folder, which every node sees and no port is needed for.

RUN/driver.lock    held by the driver while it lives; names its host and pid
RUN/wanted.json    what `manta scale` asks for
RUN/roster.json    every part of the run: name, state, host, pid, log
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deploy.config.config_errors import ConfigError
from deploy.config.run_folder import LOCK, read_json, writing

WANTED, ROSTER = "wanted.json", "roster.json"
MOST_WORKERS = 1024  # that one driver looks after


@contextmanager
def driving(folder: Path) -> Iterator[None]:
    """Be the one driver of a run; ConfigError where another is. The system lets go of it however we end."""
    with writing(folder):
        lock_file = (folder / LOCK).open("a+", encoding="utf-8")
    with lock_file as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise ConfigError(
                f"{folder} is being driven already ({lock.read().strip()}): stop that one first"
            ) from None
        if not _is_file_of(lock.fileno(), folder / LOCK):
            raise ConfigError(f"{folder} was given up and removed just now: say it again")
        lock.truncate(0)
        lock.write(f"pid {os.getpid()} on {socket.gethostname()}")
        lock.flush()
        (folder / WANTED).unlink(missing_ok=True)  # what was asked of an earlier driver
        yield


def _is_file_of(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def is_driven(folder: Path) -> bool:
    """Whether a driver holds the run right now."""
    try:
        with (folder / LOCK).open("r", encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def ask_workers(folder: Path, workers: int) -> None:
    """Ask the driver of a run for so many rollout workers. ConfigError for a number that no driver looks after."""
    if not 1 <= workers <= MOST_WORKERS:
        raise ConfigError(f"--workers {workers}: name a number from 1 to {MOST_WORKERS}")
    if not is_driven(folder):
        raise ConfigError(f"{folder}: no driver is running it, so there is nothing to scale")
    _replace(folder / WANTED, {"workers": workers})


def wanted_workers(folder: Path) -> int | None:
    """What was asked for last, or None. ConfigError for what is no number of workers."""
    asked = _read(folder / WANTED)
    if asked is None:
        return None
    workers = asked.get("workers") if isinstance(asked, dict) else None
    if type(workers) is not int or not 1 <= workers <= MOST_WORKERS:
        raise ConfigError(
            f'{folder / WANTED}: holds no {{"workers": 1..{MOST_WORKERS}}}; ask with manta scale'
        )
    return workers


def write_roster(folder: Path, roster: list[dict[str, Any]]) -> None:
    _replace(folder / ROSTER, roster)


def read_roster(folder: Path) -> list[dict[str, Any]]:
    """Empty before the run's parts have started."""
    return _read(folder / ROSTER) or []


def _read(path: Path) -> Any:
    return read_json(path) if path.exists() else None


def _replace(path: Path, content: Any) -> None:
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(json.dumps(content, indent=1), encoding="utf-8")
    aside.replace(path)
