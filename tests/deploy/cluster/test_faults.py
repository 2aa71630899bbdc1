"""Faults that are really injected, in short; `make faults` is the long form."""

from __future__ import annotations

import os
import signal
import tempfile
from pathlib import Path

import psutil
import pytest

from deploy.cluster.janitor import GRACE_SECONDS, TAG
from tests.faults import ledger, matrix, resumes
from tests.faults.matrix import KILL, STOP, TERM, Kind
from tests.faults.run import Driver, until

pytestmark = pytest.mark.slow


@pytest.mark.rare
def test_the_whole_job_killed_again_and_again_ends_where_the_uninterrupted_one_does(tmp_path: Path) -> None:
    result = resumes.run(tmp_path, kills=3, extra=["--local"])
    assert result.kills == 3
    assert result.sound, result


@pytest.mark.timeout(600)
@pytest.mark.rare  # the whole of it: make faults ARGS=matrix
def test_parts_that_die_or_freeze_lose_nothing(tmp_path: Path) -> None:
    kinds = [
        Kind("rollout", TERM, "random"),
        Kind("rollout", STOP, "sync"),
        Kind("replay buffer", KILL, "random"),
        Kind("learner", KILL, "checkpoint"),
    ]
    # One rank: a lost one of several is test_ring_ranks's matter, and starting them is most of the time.
    outcomes, books, status = matrix.run(tmp_path / "run", kinds, overrides=["learner.ranks=1"])
    assert [outcome.error for outcome in outcomes] == [""] * len(kinds)
    assert outcomes[0].tokens_again == 0, "a worker that is told beforehand leaves no turn behind"
    assert books.sound, books
    assert status == 0


@pytest.mark.rare  # twenty times: make faults ARGS="ledger --kills 20"
@pytest.mark.timeout(600)
def test_the_node_of_the_ledger_lost_with_its_disk_loses_nothing(tmp_path: Path) -> None:
    result = ledger.run(tmp_path / "run", 1)
    assert result.sound, result


def _tagged(folder: Path) -> list[int]:
    """Processes of the run in `folder`, by the id that its janitor was told."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                environment = (entry / "environ").read_bytes()
                command = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if str(folder).encode() in command or f"{TAG}_TEST={folder}".encode() in environment:
                found.append(int(entry.name))
    return found


def _described(pid: int) -> str:
    """What a process is, who started it, and whether the janitor can know it."""
    try:
        facts = psutil.Process(pid).as_dict(["cmdline", "status", "ppid", "num_threads", "environ"])
    except psutil.NoSuchProcess:
        return f"{pid} has ended"
    return f"{pid}, with the run's id: {TAG in (facts.pop('environ') or ())}, {facts}"


@pytest.mark.parametrize(
    "how",
    ["killed", *(pytest.param(how, marks=pytest.mark.rare) for how in ("stopped", "beyond its budget"))],
)
def test_whatever_ends_a_run_nothing_of_it_is_left(how: str, tmp_path: Path) -> None:
    folder, temporary = tmp_path / "run", Path(tempfile.mkdtemp(prefix="mt-", dir="/tmp"))
    driver = Driver(
        folder,
        ["steps=100000", "evaluation.tasks=0", "stages.0.source.episodes=8", "supervision.max_restarts=0"],
        {f"{TAG}_TEST": str(folder), "TMPDIR": str(temporary)},
    )
    driver.start()
    try:
        until(
            lambda: (len(driver.consumed()) >= 2 and driver.roster()) or not driver.alive(),
            120,
            "the second step",
        )
        assert driver.alive(), driver.tail()
        for entry in temporary.iterdir():
            assert not entry.stat().st_mode & 0o077, f"{entry.name} can be reached by other users"
        if how == "killed":
            driver.signal(signal.SIGKILL)
            assert driver.wait(30) == -signal.SIGKILL
        elif how == "stopped":
            driver.signal(signal.SIGTERM)
            assert driver.wait(60) == 130
            assert driver.tail(1) == f"stopped; go on with: manta train --resume {folder}"
        else:
            (worker,) = [part for part in driver.roster() if part["part"] == "rollout-0"]
            os.kill(worker["pid"], signal.SIGKILL)
            assert driver.wait(120) == 1
            last = driver.tail(1)
            assert (
                last.startswith("manta: rollout-0 was lost 1 times")
                and "host " in last
                and "ActorDiedError" in last
            )
    finally:
        driver.stop()
    try:
        until(lambda: not _tagged(folder), GRACE_SECONDS + 45, "the end of every process of the run")
    except TimeoutError as late:
        raise AssertionError("\n".join(map(_described, _tagged(folder)))) from late
    assert not list(temporary.iterdir())
    temporary.rmdir()
    if how == "beyond its budget":
        log = last.split(" log ")[1].split(";")[0]
        assert Path(log).is_file() and Path(log).is_relative_to(folder / "logs")
