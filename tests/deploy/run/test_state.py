"""The state of a run as a script reads it, against what the run's files say."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
from pathlib import Path

import pytest

from deploy.cluster.control import driving, write_roster
from deploy.commands.status import described, log_of, state_of, stop_run
from deploy.config.config_errors import ConfigError
from deploy.config.supervise import Budget, PartLost, SupervisionSettings
from deploy.report.progress import Progress
from deploy.run.interrupt import Stopped
from deploy.run.state import DRIVER_LOG, Recorded, RunState, run_state
from tests.deploy.small_run import configured

DOCS = Path(__file__).parents[3] / "docs"


@pytest.fixture
def run(reference: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(reference, tmp_path / "run"))


def test_a_finished_run_is_told_as_its_files_have_it(run: Path) -> None:
    with Recorded(run):
        pass
    state = run_state(run)
    last = json.loads((run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    assert (state.phase, state.step, state.steps) == ("finished", last["step"], 4)
    assert (state.success, state.reward) == (last["success"], last["reward"])
    assert state.evaluations == {when: summary[f"success_{when}"] for when in ("before", "after")}
    assert (state.failure, state.workers, state.restarts) == (None, None, {"driver": 0})
    assert all(Path(path).exists() for path in state.paths.values()) and "report" in state.paths
    assert Path(state.paths["model"], "config.json").is_file()
    assert "finished" in described(state) and "4 of 4" in described(state)


def test_a_phase_of_a_driver_that_is_gone_is_killed(run: Path) -> None:
    with driving(run):
        recorded = Recorded(run)
        recorded.__enter__()
        entered = {"start": "starting", "stage_data": "stages", "evaluate_before": "evaluating"}
        for phase, told in (entered | {"training": "training"}).items():
            recorded.enter(phase)
            assert run_state(run).phase == told
        driver = run_state(run).driver
        assert driver is not None
        assert (driver.host, driver.pid, driver.alive) == (socket.gethostname(), os.getpid(), True)
    assert run_state(run).phase == "killed"


def test_how_a_session_ends_is_told(run: Path) -> None:
    with pytest.raises(Stopped), Recorded(run):
        raise Stopped
    assert run_state(run).phase == "stopped"
    with pytest.raises(ValueError), Recorded(run):
        raise ValueError("a row of 3 tokens\nand more")
    state = run_state(run)
    assert state.phase == "failed" and state.failure is not None
    assert (state.failure.kind, "\n" in state.failure.message) == ("ValueError", False)


def test_workers_and_losses_are_counted(run: Path) -> None:
    write_roster(run, [
        {"part": "learner", "state": "up"},
        {"part": "rollout-0", "state": "serving"},
        {"part": "rollout-1.1", "state": "starting"},
    ])  # fmt: skip
    budget = Budget(SupervisionSettings(), folder=run)
    for _ in range(2):
        budget.spend("rollout-1", None, PartLost("no heartbeat"))
    (run / "notices.log").write_text("note: one\nnote: two\n", encoding="utf-8")
    with driving(run), pytest.raises(Stopped), Recorded(run):
        workers = run_state(run).workers
        raise Stopped
    assert workers is not None and (workers.serving, workers.wanted) == (1, configured().rollout.workers)
    state = run_state(run)
    assert state.workers is not None and state.workers.serving == 0
    assert state.restarts == {"rollout-1": 2, "driver": 0} and state.notice == "note: two"


def test_the_drivers_log_holds_what_its_console_says(run: Path) -> None:
    with pytest.raises(ConfigError, match=f"has no {DRIVER_LOG}"):
        list(log_of(str(run), None, "", False))
    with Progress(4, "title", log=run / DRIVER_LOG) as progress:
        progress.say("one \x1b[31mline")
    said = "".join(log_of(str(run), None, "", False))
    assert re.fullmatch(r"\[ +0\.\d s\] title\n\[ +0\.\d s\] one \\x1b\[31mline\n", said)


def test_what_cannot_be_shown_or_stopped_is_one_line(run: Path) -> None:
    write_roster(run, [{"part": "rollout-0", "state": "serving", "log": "/elsewhere/worker-a.err"}])
    for part, said in (
        ("rollout-9", "has no part rollout-9 with a log; it has rollout-0"),
        ("rollout-0", "copied"),
    ):
        with pytest.raises(ConfigError, match=said):
            list(log_of(str(run), None, part, False))
    kept = run / "logs" / "host-1a2b" / "worker-a.err"
    kept.parent.mkdir(parents=True)
    kept.write_text("kept", encoding="utf-8")
    assert "".join(log_of(str(run), None, "rollout-0", False)) == "kept"
    with pytest.raises(ConfigError, match=r"is not running: killed"):
        stop_run(str(run), None, 1)
    with pytest.raises(ConfigError, match="no Ray cluster answers"):
        state_of(str(run), "http://127.0.0.1:1")


def test_the_page_has_every_field_of_a_state() -> None:
    page = (DOCS / "clusters.md").read_text(encoding="utf-8")
    section = page.split("## The state of a run")[1].split("\n## ")[0]
    assert re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE) == list(RunState.model_fields)
