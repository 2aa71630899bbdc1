"""A run whose driver is started again when it is lost: `manta train --retries N`.

Ray's jobs have no retries of their own: what a job's driver leaves when it is killed is for its submitter to go on
with. So the job's command is this small process, whose child is the driver. The child is the same command again, which
goes on with the run in its folder.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import FrameType

from deploy.config.config_errors import ConfigError
from deploy.run.interrupt import INTERRUPTED
from envs.child_process import die_with_parent

ATTEMPT = "MANTA_ATTEMPT"  # set for the driver of a supervised run, and removed by it
MISTAKE = 2  # exit status of a user's mistake
LONGEST_WAIT_SECONDS = 60.0
# What a run says of itself: the next driver would come to the same.
VERDICTS = ("GuardTripped", "TooManyFailures", "OwnPartError")
_LOOK_SECONDS = 0.2


def is_retried() -> bool:
    """Whether this process is the driver that `supervise` has started; its own children are none."""
    return os.environ.pop(ATTEMPT, "") != ""


def supervise(folder: Path, retries: int, say: Callable[[str], None], wait_seconds: float = 1.0) -> int:
    """Run this command as a child, again after each loss, at most `retries` times; returns the exit status.

    A loss is a child that was killed by a signal or ended by an error. No loss: a run that finished, was stopped, or
    ended by a verdict about itself, and a user's mistake that the first start finds; a later one finds what the loss
    has left, as a cluster that lacks a node. The waits between two starts double from `wait_seconds` to
    LONGEST_WAIT_SECONDS.
    """
    command = [sys.executable, *sys.orig_argv[1:]]
    with _Told() as told:
        for attempt in range(retries + 1):
            status = told.run(command, attempt)
            if told.stopped or not _lost(status, attempt, folder):
                return INTERRUPTED if told.stopped and status < 0 else status
            if attempt == retries:
                break
            wait = min(wait_seconds * 2**attempt, LONGEST_WAIT_SECONDS)
            say(
                f"the driver {_ended(status)}; start {attempt + 1} of at most {retries} more in {wait:g} s, from what "
                f"{folder} holds"
            )
            if told.within(wait):
                return INTERRUPTED
        say(f"the driver {_ended(status)}; it was started {retries + 1} times, as --retries allows")
        return status if status > 0 else 128 - status


def require_folder(run_dir: Path | None, resume: Path | None) -> Path:
    """The folder in which every start goes on. ConfigError if the command names none."""
    folder = run_dir or resume
    if folder is None:
        raise ConfigError(
            "--retries goes on in the run's folder: name it by --run-dir RUN, or by --resume RUN"
        )
    return folder


def _lost(status: int, attempt: int, folder: Path) -> bool:
    if status <= 0:
        return status < 0
    if status == INTERRUPTED or (status == MISTAKE and attempt == 0):
        return False
    from deploy.run.state import (
        FAILED,
        last_words,
    )  # heavy, as the driver is: this process holds little meanwhile

    told = last_words(folder)
    return not (told.get("phase") == FAILED and told["failure"]["kind"] in VERDICTS)


def _ended(status: int) -> str:
    return f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"


class _Told:
    """Context in which SIGTERM and SIGINT are passed on to the child, after which there is no further start."""

    def __init__(self) -> None:
        self.stopped = False
        self._child: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> _Told:
        self._before = {each: signal.signal(each, self._hear) for each in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *error: object) -> None:
        for each, handler in self._before.items():
            signal.signal(each, handler)

    def run(self, command: Sequence[str], attempt: int) -> int:
        """The exit status of the child, negative for a signal. It does not outlive this process."""
        environment = os.environ | {ATTEMPT: str(attempt + 1)}
        bound = partial(die_with_parent, os.getpid(), signal.SIGTERM)
        self._child = subprocess.Popen(command, env=environment, preexec_fn=bound)
        if self.stopped:  # told between the two lines above
            self._child.terminate()
        return self._child.wait()

    def within(self, seconds: float) -> bool:
        """Wait; whether the run was told to stop meanwhile."""
        deadline = time.monotonic() + seconds
        while not self.stopped and time.monotonic() < deadline:
            time.sleep(_LOOK_SECONDS)
        return self.stopped

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self.stopped = True
        # Ctrl-C in a terminal reaches the child by itself.
        if number == signal.SIGTERM and self._child is not None and self._child.poll() is None:
            self._child.send_signal(number)
