"""`manta status`, `manta logs` and `manta stop` of a run in a folder of this machine, or of a job on a cluster."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from textwrap import indent
from typing import TYPE_CHECKING

from deploy.commands.cluster_jobs import ask, connect, find, follow, run_of, stop
from deploy.config import run_folder
from deploy.config.config_errors import ConfigError
from deploy.run.part_logs import driver_log, part_log
from deploy.run.state import FAILED, KILLED, Failure, RunState, run_state

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

_LOOK_SECONDS = 0.5
# What Ray says of a job without a run folder -> the phase of its run.
_PHASES = {"PENDING": "pending", "RUNNING": "starting", "STOPPED": "stopped", "SUCCEEDED": "finished"}


def state_of(target: str, address: str | None, here: bool = False) -> RunState:
    """The state of a run: of a folder of this machine, or of a job on the cluster. here: no cluster is asked."""
    if here or _lies_here(target, address):
        return run_state(Path(target))
    client = connect(address)
    job = find(client, target)
    state = _of_job(client, job)
    state.job, state.job_status = str(job.submission_id), job.status.name
    if state.phase == KILLED and state.job_status == "RUNNING":
        state.phase = "restarting"
    return state


def _lies_here(target: str, address: str | None) -> bool:
    """Whether a folder of this machine is meant: no cluster is named, and there is such a folder."""
    return address is None and Path(target).is_dir()


def _of_job(client: JobSubmissionClient, job: JobDetails) -> RunState:
    run = run_of(job)
    if run and run_folder.exists(Path(run)):
        return run_state(Path(run))
    said = ask(client, job, "status", run, "--json") if run and job.status.name != "PENDING" else None
    if said is not None:
        return RunState.model_validate_json(said)
    # It has no folder yet, or never got one.
    state = RunState(run=run or "", phase=_PHASES.get(job.status.name, FAILED))
    if state.phase == FAILED:
        lines = (job.message or "").strip().splitlines()
        state.failure = Failure(kind=str(job.error_type or "job"), message=lines[-1] if lines else "")
    return state


def described(state: RunState) -> str:
    """The state for a person: what is known of it, a line each."""
    results = {"success": state.success, "reward": state.reward} | {
        f"evaluated {when}": value for when, value in state.evaluations.items()
    }
    shown = "  ".join(f"{name} {value:.3f}" for name, value in results.items() if value is not None)
    losses = ", ".join(f"{part} {count}" for part, count in state.restarts.items() if count)
    workers = state.workers and f"{state.workers.serving} of {state.workers.wanted} serving"
    failure = state.failure and f"{state.failure.kind}: {state.failure.message}"
    job = f"{state.job} {state.job_status.lower()}".strip()
    lines = {
        "run": state.run,
        "phase": state.phase,
        "step": f"{state.step} of {state.steps}" if state.steps else "",
        "results": shown,
        "workers": workers,
        "restarts": losses,
        "notice": state.notice,
        "failure": failure,
        "job": job,
        "updated": state.updated,
        "report": state.paths.get("report"),
    }
    told = "\n".join(f"{name:9} {value}" for name, value in lines.items() if value)
    policies = (f"\npolicy {name}\n{indent(described(each), '  ')}" for name, each in state.policies.items())
    return told + "".join(policies)


def log_of(target: str, address: str | None, part: str, following: bool, here: bool = False) -> Iterator[str]:
    """Yield the text of a log: the driver's, or a part's. following: go on until the run has ended."""
    if here or _lies_here(target, address):
        folder = Path(target)
        yield from _read(folder, part_log(folder, part) if part else driver_log(folder), following)
        return
    client = connect(address)
    job = find(client, target)
    identity, run = str(job.submission_id), run_of(job)
    if not part:
        yield from follow(client, identity) if following else [client.get_job_logs(identity)]
        return
    if following:
        raise ConfigError("--follow shows the driver's log of a job: leave --part or --follow away")
    if run is None:
        raise ConfigError(f"job {identity} names no run folder, so its parts are not known; see its own log")
    said = ask(client, job, "logs", run, "--part", part)
    if said is None:
        raise ConfigError(f"the cluster shows no log of part {part} of {run}; see manta status {identity}")
    yield said


def _read(folder: Path, file: Path, following: bool) -> Iterator[str]:
    with file.open(encoding="utf-8", errors="replace") as log:
        while True:
            ended = run_state(folder).ended  # looked at before the last reading
            yield log.read()
            if ended or not following:
                return
            time.sleep(_LOOK_SECONDS)


def stop_run(target: str, address: str | None, seconds: float) -> str:
    """Stop a run in order and wait for its end; returns what to say of it."""
    if _lies_here(target, address):
        _stop_here(Path(target), seconds)
        return f"stopped; go on with: manta train --resume {shlex.quote(target)}"
    client = connect(address)
    job = find(client, target)
    if job.status.is_terminal():
        raise ConfigError(f"job {job.submission_id} has ended already: {job.status.name.lower()}")
    stop(client, str(job.submission_id), seconds)
    return f"stopped {job.submission_id}" + (f"; its run is {run}" if (run := run_of(job)) else "")


def _stop_here(folder: Path, seconds: float) -> None:
    state = run_state(folder)
    if state.driver is None or not state.driver.alive:
        raise ConfigError(f"{folder} is not running: {state.phase}")
    if state.driver.host != socket.gethostname():
        job = (
            f"manta stop {state.job} --address URL"
            if state.job
            else f"run this command on {state.driver.host}"
        )
        raise ConfigError(f"the driver of {folder} runs on {state.driver.host}: {job}")
    os.kill(state.driver.pid, signal.SIGTERM)
    deadline = time.monotonic() + seconds
    while (driver := run_state(folder).driver) and driver.alive:
        if time.monotonic() > deadline:
            raise ConfigError(f"{folder} has not ended {seconds:g} s after SIGTERM to pid {state.driver.pid}")
        time.sleep(_LOOK_SECONDS)
