"""The state of a run as one object: what its driver said last, and what its folder holds.

RUN/state.json      written by the driver when a phase begins and when the session ends
RUN/losses.jsonl    one line for each loss of a part (deploy/config/supervise.py)

`manta status RUN --json` prints it; docs/clusters.md has the table of its fields.
"""

from __future__ import annotations

import json
import os
import socket
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from math import isfinite
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field

from deploy.cluster.control import is_driven, read_roster, wanted_workers
from deploy.config import run_folder
from deploy.config.config import RunConfig
from deploy.config.policies import is_several
from deploy.config.supervise import LOSSES, brief
from deploy.config.timestamps import timestamp
from deploy.report.evaluation import WHEN, Evaluation
from deploy.report.metrics import METRICS_FILE, read_metrics
from deploy.report.noticed import FILE as NOTICES
from deploy.run.failure_log import FAILURE_LOG
from deploy.run.interrupt import Stopped
from deploy.run.sessions import past_sessions
from rollout.wire.whole_file import replace_file

STATE = "state.json"
DRIVER_LOG = "driver.log"
CHECKPOINTS = "checkpoints"
STOPPED, FAILED, FINISHED, KILLED = "stopped", "failed", "finished", "killed"
ENDED = (FINISHED, STOPPED, FAILED, KILLED)
# What the driver calls its phases (deploy/run/train.py) -> what a state calls them.
_PHASES = {"start": "starting", "engines": "starting", "stage_data": "stages", "stages": "stages"}
_EVALUATION = "evaluate_"


class Failure(BaseModel):
    """How a session ended that was neither finished nor stopped."""

    kind: str = Field(description="name of the error's class")
    message: str = Field(description="its message, one line")


class Driver(BaseModel):
    """The process that drives the run, or drove it last."""

    host: str = Field(description="host name")
    pid: int = Field(description="process id")
    alive: bool = Field(False, description="whether it holds the run's lock")


class Workers(BaseModel):
    """Rollout workers of a run on Ray."""

    wanted: int = Field(description="by the recipe or the last `manta scale`")
    serving: int = Field(description="that hold the current weights and play")


class RunState(BaseModel):
    """The state of a run. All times are local with their offset, ISO 8601."""

    model_config = ConfigDict(extra="forbid")

    run: str = Field(description="folder of the run")
    name: str = Field("", description="the recipe's name")
    phase: str = Field(
        description="pending (the job has not begun), starting, stages, evaluating, training, restarting (a retried "
        "job), finished, stopped, failed, or killed (the driver ended without a word)"
    )
    step: int = Field(0, description="learner steps made")
    steps: int = Field(0, description="steps that the run is to make")
    success: float | None = Field(
        None, description="success rate of the last step's batch; null without verdicts"
    )
    reward: float | None = Field(None, description="mean reward of the last step's batch")
    evaluations: dict[str, float] = Field(
        {},
        description="success rate, else mean reward, of the evaluations `base`, `before` and `after` that there are",
    )
    workers: Workers | None = Field(None, description="null without Ray")
    restarts: dict[str, int] = Field(
        {},
        description="how often each part was lost and replaced, and `driver`: how often the run was resumed",
    )
    notice: str = Field("", description="the last notice (RUN/notices.log)")
    failure: Failure | None = Field(None, description="why the last session failed; else null")
    began: str = Field("", description="when the first session began")
    updated: str = Field("", description="when the last step or phase was stored")
    driver: Driver | None = Field(None, description="null before the first session")
    job: str = Field("", description="id of the Ray job of the last session; empty without one")
    job_status: str = Field("", description="what Ray says of that job; empty where no cluster was asked")
    paths: dict[str, str] = Field({}, description="files and folders of the run that exist, by name")
    policies: dict[str, RunState] = Field({}, description="the same of each of several policies, by its name")

    @property
    def ended(self) -> bool:
        """Whether no session is under way."""
        return self.phase in ENDED


class Recorded:
    """Context of one session of a run: stores its phases, and how it ends. A full disk loses a phase, not the run."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._told: dict[str, Any] = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "job": submission_id(),
        }

    def __enter__(self) -> Self:
        self._store("starting")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._store(FINISHED)
        elif isinstance(error, Stopped | KeyboardInterrupt):
            self._store(STOPPED)
        else:
            lines = str(error).strip().splitlines()
            failure = Failure(
                kind=type(error).__name__, message=lines[0] if len(lines) == 1 else brief(error)
            )
            self._store(FAILED, failure.model_dump())

    def enter(self, phase: str) -> None:
        """The driver has begun a phase, by its own name."""
        self._store("evaluating" if phase.startswith(_EVALUATION) else _PHASES.get(phase, phase))

    def _store(self, phase: str, failure: dict[str, str] | None = None) -> None:
        told = self._told | {"phase": phase, "since": timestamp(), "failure": failure}
        with suppress(OSError):
            replace_file(self._folder / STATE, json.dumps(told, indent=1))


def submission_id() -> str:
    """The id of the Ray job that this process belongs to; empty outside of one."""
    config = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}")
    return str(config.get("metadata", {}).get("job_submission_id", ""))


def last_words(folder: Path) -> dict[str, Any]:
    """What the driver of a run stored last; empty before the first session."""
    file = folder / STATE
    told = run_folder.read_json(file) if file.is_file() else {}
    return told if isinstance(told, dict) else {}


def run_state(folder: Path) -> RunState:
    """Read the state of a run from its folder. ConfigError, one line, where that is no run."""
    config, told = run_folder.open_existing(folder), last_words(folder)
    rows, driven = read_metrics(folder), is_driven(folder)
    last = rows[-1] if rows else {}
    phase = str(told.get("phase", KILLED))
    phase = phase if driven or phase in ENDED else KILLED
    policies = _policies(folder, config, phase)
    driver = {"host": told.get("host", ""), "pid": told.get("pid", 0), "alive": driven}
    return RunState(
        run=str(folder.resolve()),
        name=config.name,
        phase=phase,
        step=min((each.step for each in policies.values()), default=int(last.get("step", 0))),
        steps=config.steps,
        success=_finite(last.get("success")),
        reward=_finite(last.get("reward")),
        evaluations=_evaluations(folder),
        workers=_workers(folder, config.workers, driven),
        restarts=_restarts(folder),
        notice=_last_line(folder / NOTICES),
        failure=told.get("failure"),
        began=next((each.began for each in past_sessions(folder)), ""),
        updated=max(_changed(folder / name) for name in (STATE, METRICS_FILE, run_folder.CONFIG_FILE)),
        driver=Driver(**driver) if told else None,
        job=str(told.get("job", "")),
        paths=dict(_paths(folder.resolve())),
        policies=policies,
    )


def _policies(folder: Path, config: RunConfig, phase: str) -> dict[str, RunState]:
    """The states of a run's policies, which share its driver: they are in its phase."""
    if not is_several(config):
        return {}
    folders = {name: run_folder.of_policy(folder, name) for name in config.policies}
    there = {name: each for name, each in folders.items() if run_folder.exists(each)}
    return {name: run_state(each).model_copy(update={"phase": phase}) for name, each in there.items()}


def _evaluations(folder: Path) -> dict[str, float]:
    files = {when: folder / f"evaluation_{when}.json" for when in WHEN}
    found = {when: Evaluation.load(file).metrics() for when, file in files.items() if file.is_file()}
    return {when: row.get("success", row["reward"]) for when, row in found.items()}


def _workers(folder: Path, recipe: int, driven: bool) -> Workers | None:
    roster = read_roster(folder)
    if not roster:
        return None
    serving = [each for each in roster if each["part"].startswith("rollout-") and each["state"] == "serving"]
    return Workers(wanted=wanted_workers(folder) or recipe, serving=len(serving) if driven else 0)


def _restarts(folder: Path) -> dict[str, int]:
    """Losses by part, and the driver's further sessions."""
    lines = (
        (folder / LOSSES).read_text(encoding="utf-8").split("\n")[:-1] if (folder / LOSSES).is_file() else []
    )
    parts = Counter(str(json.loads(line)["part"]) for line in lines)
    return dict(parts) | {"driver": max(len(past_sessions(folder)) - 1, 0)}


def _paths(folder: Path) -> Iterator[tuple[str, str]]:
    # A folder has its name from when it is whole.
    checkpoint = max(folder.glob(f"{CHECKPOINTS}/version-*"), default=None)
    there = {
        "report": folder / "report.html",
        "metrics": folder / METRICS_FILE,
        "log": folder / DRIVER_LOG,
        "logs": folder / "logs",
        "notices": folder / NOTICES,
        "failure": folder / FAILURE_LOG,
        "ledger": folder / "ledger.sqlite",
        "checkpoint": checkpoint,
        "model": checkpoint and checkpoint / "model",
    }
    yield from ((name, str(path)) for name, path in there.items() if path is not None and path.exists())


def _last_line(file: Path) -> str:
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else []
    return lines[-1] if lines else ""


def _changed(file: Path) -> str:
    return timestamp(file.stat().st_mtime) if file.exists() else ""


def _finite(value: float | None) -> float | None:
    return None if value is None or not isfinite(value) else value
