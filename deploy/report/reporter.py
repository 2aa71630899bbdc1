"""Reports during a run, written by a separate process: the driver never waits for them.

A report reads every stored row, so its cost grows with the run. One report is written at a time, at low priority, and
the next one only when SHARE allows: reports take at most that share of one core.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from deploy.report.evaluation import WHEN
from deploy.report.metrics import METRICS_FILE

ERR_FILE = "report.err"  # stderr of the writing process; kept if it failed
FIRST_SECONDS = 10.0  # no report earlier; shorter runs have one at their end
SHARE = 0.05  # of one core's time
LAST_SECONDS = 120.0  # limit for the report of a stopped run


class Reporter:
    """Writes the reports of one run. A failure is reported in one line and does not end the run."""

    def __init__(self, run_folder: Path, say: Callable[[str], None]) -> None:
        self._folder = run_folder
        self._say = say
        self._process: subprocess.Popen[bytes] | None = None
        self._began = 0.0
        self._rest_until = time.monotonic() + FIRST_SECONDS

    def refresh(self) -> None:
        """Start a report unless one is being written or the last one is too recent; returns at once."""
        now = time.monotonic()
        if self._process is not None and self._process.poll() is not None:
            self._rest_until = self._began + (now - self._began) / SHARE
            self._ended()
        if self._process is None and now >= self._rest_until:
            self._begin()

    def last(self) -> None:
        """Write the report of a stopped run and wait at most LAST_SECONDS; nothing without any stored number."""
        self.close()
        shown = [METRICS_FILE, *(f"evaluation_{when}.json" for when in WHEN)]
        if not any((self._folder / name).is_file() for name in shown):
            return
        self._begin()
        assert self._process is not None
        try:
            self._process.wait(LAST_SECONDS)
        except subprocess.TimeoutExpired:
            self._say(f"no report within {LAST_SECONDS:g} s; write it later with manta report RUN")
            self.close()
        else:
            self._ended()

    def close(self) -> None:
        """Stop the current report; the previous one stays."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _begin(self) -> None:
        self._began = time.monotonic()
        with (self._folder / ERR_FILE).open("wb") as err:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "deploy.report.report", str(self._folder.resolve())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=err,
                cwd=Path(__file__).parents[2],  # the folder of this package
                start_new_session=True,  # Ctrl-C in the terminal must not reach it
            )

    def _ended(self) -> None:
        assert self._process is not None
        code, self._process = self._process.returncode, None
        err = self._folder / ERR_FILE
        if code:
            lines = err.read_text(encoding="utf-8", errors="replace").strip().splitlines() or [f"exit {code}"]
            self._say(f"the report was not written: {lines[-1]} ({err})")
        else:
            err.unlink(missing_ok=True)
