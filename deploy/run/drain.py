"""Processes of runs on this host, told to leave before the host is taken away: a pod that is ended, a preemption."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import psutil

# Ray gives a worker's process the name of its actor.
_WORKER = "ray::RolloutActor"


def leaving() -> list[psutil.Process]:
    """The rollout workers and drivers of this host: they end in order when they get SIGTERM."""
    return [process for process in psutil.process_iter() if _leaves(process)]


def drain(seconds: float) -> tuple[int, int]:
    """Send them SIGTERM and wait until they have ended, at most so long; returns how many there were, and are left.

    A worker lets its turns end and gives its groups to others; a driver lets a checkpoint arrive that is being written.
    """
    told = list(_told(leaving()))
    _, left = psutil.wait_procs(told, timeout=seconds)
    return len(told), len(left)


def _told(processes: list[psutil.Process]) -> Iterator[psutil.Process]:
    for process in processes:
        try:
            process.send_signal(signal.SIGTERM)
        except psutil.NoSuchProcess:
            continue
        yield process


def _leaves(process: psutil.Process) -> bool:
    try:
        words = process.cmdline()
    except psutil.Error:  # it has ended, or is of another user
        return False
    if words and words[0].startswith(_WORKER):
        return True
    # `manta train`, as a script or by -m; a shell that holds these words in one argument is none.
    manta = [at for at, word in enumerate(words) if word.rpartition("/")[2] in ("manta", "deploy.cli")]
    return bool(manta) and words[manta[0] + 1 : manta[0] + 2] == ["train"]
