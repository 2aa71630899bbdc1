"""How a run's processes are known after its driver is gone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from deploy import janitor

TITLES = {
    "ray's agents": "from ray._raylet import setproctitle",
    "vllm's processes": "from setproctitle import setproctitle",
}


@pytest.mark.parametrize("whose", TITLES)
def test_a_process_that_names_itself_still_carries_the_runs_id(
    whose: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", dict(os.environ))  # what tag_run sets ends with this test
    os.environ.pop(janitor.TAG, None)
    os.environ.pop("SPT_NOENV", None)
    run = janitor.tag_run()
    # The id comes first in the environment: there a title that is longer than the command reaches it.
    environment = {janitor.TAG: run} | os.environ
    code = f"{TITLES[whose]}\nsetproctitle('a title ' * 40)\nprint(flush=True)\ninput()"
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"\n"
        assert "a title" in Path(f"/proc/{process.pid}/cmdline").read_text()
        assert process.pid in janitor.processes_of(run)
    finally:
        process.kill()
        process.communicate()
