"""A driver that is lost is started again, and only one that is lost: every child here is a script of the test."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from deploy.config.config_errors import ConfigError
from deploy.run.retries import ATTEMPT, require_folder, supervise

KILLED = "os.kill(os.getpid(), signal.SIGKILL)"
GUARD = "say('failed', 'GuardTripped'); sys.exit(1)"
LOST = "say('failed', 'PartFailed'); sys.exit(1)"
CHILD = """
import json, os, signal, sys, time
from pathlib import Path
folder = Path(sys.argv[1])
started = folder / "started"
attempt = os.environ["{attempt}"]
started.write_text((started.read_text() if started.exists() else "") + attempt)
def say(phase, kind):
    (folder / "state.json").write_text(json.dumps(dict(phase=phase, failure=dict(kind=kind, message=""))))
{ends}
"""


def supervised(
    folder: Path, monkeypatch: pytest.MonkeyPatch, ends: dict[str, str], retries: int = 2
) -> tuple[int, str, list[str]]:
    """The exit status, the attempts that were started, and what was said. ends: what attempt N does."""
    script = folder / "child.py"
    chosen = "".join(f"if attempt == '{number}':\n    {end}\n" for number, end in ends.items())
    script.write_text(CHILD.format(attempt=ATTEMPT, ends=chosen), encoding="utf-8")
    monkeypatch.setattr(sys, "orig_argv", [sys.executable, str(script), str(folder)])
    said: list[str] = []
    status = supervise(folder, retries, said.append, wait_seconds=0.01)
    return status, (folder / "started").read_text(encoding="utf-8"), said


@pytest.mark.parametrize(
    ("ends", "status", "started"),
    [
        ({"1": KILLED}, 0, "12"),
        ({"1": KILLED, "2": LOST}, 0, "123"),
        ({"1": KILLED, "2": KILLED, "3": KILLED}, 128 + signal.SIGKILL, "123"),
        ({"1": "sys.exit(2)"}, 2, "1"),  # a user's mistake
        ({"1": KILLED, "2": "sys.exit(2)"}, 0, "123"),  # the cluster that the loss has left
        ({"1": "sys.exit(130)"}, 130, "1"),  # stopped by a person
        ({"1": GUARD}, 1, "1"),  # a verdict of the run about itself
        ({"1": "sys.exit(1)", "2": GUARD}, 1, "12"),
    ],
)
def test_a_driver_is_started_again_after_a_loss_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends: dict[str, str], status: int, started: str
) -> None:
    assert supervised(tmp_path, monkeypatch, ends)[:2] == (status, started)


def test_what_happened_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, said = supervised(tmp_path, monkeypatch, {"1": KILLED, "2": LOST}, retries=1)
    assert said[0].startswith("the driver was killed by SIGKILL; start 1 of at most 1 more in 0.01 s")
    assert said[1] == "the driver ended with status 1; it was started 2 times, as --retries allows"


def test_sigterm_reaches_the_driver_and_ends_the_retries(tmp_path: Path) -> None:
    script, supervisor = tmp_path / "child.py", tmp_path / "supervisor.py"
    waits = (
        "signal.signal(signal.SIGTERM, lambda *_: (folder / 'told').touch() or sys.exit(130))\n"
        "(folder / 'ready').touch()\ntime.sleep(60)"
    )
    script.write_text(CHILD.format(attempt=ATTEMPT, ends=waits), encoding="utf-8")
    supervisor.write_text(
        "import sys\nfrom pathlib import Path\nfrom deploy.run.retries import supervise\n"
        f"sys.orig_argv = [sys.executable, {str(script)!r}, {str(tmp_path)!r}]\n"
        f"sys.exit(supervise(Path({str(tmp_path)!r}), 3, print))\n",
        encoding="utf-8",
    )
    process = subprocess.Popen([sys.executable, str(supervisor)])
    ready = threading.Event()
    while not (tmp_path / "ready").exists():
        assert process.poll() is None
        ready.wait(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 130
    assert (tmp_path / "told").exists() and (tmp_path / "started").read_text(encoding="utf-8") == "1"


def test_a_run_without_a_named_folder_cannot_be_retried() -> None:
    with pytest.raises(ConfigError, match=r"name it by --run-dir RUN, or by --resume RUN"):
        require_folder(None, None)


def test_the_drivers_last_words_are_those_that_decide(tmp_path: Path) -> None:
    from deploy.run.state import Recorded, last_words
    from rollout.buffer.failures import TooManyFailures

    with pytest.raises(TooManyFailures), Recorded(tmp_path):
        raise TooManyFailures("20 of the last 20 episodes failed")
    assert last_words(tmp_path)["failure"] == {
        "kind": "TooManyFailures",
        "message": "20 of the last 20 episodes failed",
    }
    assert json.loads((tmp_path / "state.json").read_text(encoding="utf-8"))["phase"] == "failed"
