"""Before a host goes, its workers and drivers are told to leave, and nothing else is."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.run import drain as draining
from deploy.run.drain import drain, leaving

WAITS = "import signal, sys, time\nsignal.signal(signal.SIGTERM, {})\nprint('up', flush=True)\ntime.sleep(60)"
ENDS, STAYS = WAITS.format("lambda *_: sys.exit(0)"), WAITS.format("signal.SIG_IGN")


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, subprocess.Popen[str]]]:
    """Processes by what they pretend to be; the first word of a command line is what Ray sets it to."""
    (tmp_path / "manta").write_text(ENDS, encoding="utf-8")
    commands = {
        "worker": ["ray::RolloutActor.run", "-c", ENDS],
        "driver": [sys.executable, str(tmp_path / "manta"), "train", "frozen_lake"],
        "stuck": ["ray::RolloutActor.run", "-c", STAYS],
        "learner": ["ray::LearnerActor", "-c", ENDS],
        "status": [sys.executable, str(tmp_path / "manta"), "status", "train"],
        "shell": [sys.executable, "-c", ENDS, "manta train frozen_lake"],
    }
    processes = {
        name: subprocess.Popen(command, executable=sys.executable, stdout=subprocess.PIPE, text=True)
        for name, command in commands.items()
    }
    for process in processes.values():
        assert process.stdout is not None and process.stdout.readline() == "up\n"
    pids = {process.pid for process in processes.values()}
    found = draining.psutil.process_iter
    # Other tests of this machine have workers too.
    monkeypatch.setattr(
        draining.psutil, "process_iter", lambda: (each for each in found() if each.pid in pids)
    )
    yield processes
    for process in processes.values():
        process.kill()
        process.wait()


def test_workers_and_drivers_leave_and_the_rest_stays(started: dict[str, subprocess.Popen[str]]) -> None:
    assert {each.pid for each in leaving()} == {started[name].pid for name in ("worker", "driver", "stuck")}
    began = time.monotonic()
    assert drain(1.0) == (3, 1)
    assert time.monotonic() - began >= 1.0  # it waited for the one that stays
    assert [name for name, process in started.items() if process.poll() is None] == [
        "stuck", "learner", "status", "shell",
    ]  # fmt: skip
