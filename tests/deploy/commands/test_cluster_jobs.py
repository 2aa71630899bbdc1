"""Jobs of a cluster: what is shown of one when the connection breaks, and which one is meant. No cluster is needed."""

from __future__ import annotations

from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from deploy.commands import cluster_jobs
from deploy.commands import status as status_command
from deploy.commands.cluster_jobs import find, follow, stop
from deploy.config.config_errors import ConfigError


class Dashboard:
    """Stands for a cluster. connections: what each connection to a job's log says; None: it breaks there."""

    def __init__(self, connections: list[list[str | None]], jobs: list[Any] | None = None) -> None:
        self._connections, self._jobs = connections, jobs or []
        self.stopped: list[str] = []

    def get_job_status(self, job: str) -> Any:
        return SimpleNamespace(is_terminal=lambda: len(self._connections) <= 1)

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        for text in self._connections.pop(0):
            if text is None:
                raise RuntimeError("closed unexpectedly")
            yield text

    def list_jobs(self) -> list[Any]:
        return self._jobs

    def stop_job(self, job: str) -> bool:
        self.stopped.append(job)
        return True


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_jobs.time, "sleep", lambda seconds: None)


def test_a_connection_that_breaks_is_made_again_and_nothing_is_shown_twice() -> None:
    says: list[list[str | None]] = [
        ["one\n", "two\n", None],
        [None],
        ["one\n", "tw", "o\nthr", "ee\n"],
        ["one\ntwo\nthree\nfour\n"],
    ]
    assert "".join(follow(Dashboard(says), "job")) == "one\ntwo\nthree\nfour\n"  # type: ignore[arg-type]


def test_a_cluster_that_stays_away_is_told() -> None:
    says: list[list[str | None]] = [["one\n"]] + [[None]] * 100
    shown: list[str] = []
    with pytest.raises(ConfigError, match=r"of job x has not answered for 60 s .*manta logs x"):
        shown.extend(follow(Dashboard(says), "x"))  # type: ignore[arg-type]


def test_a_job_is_found_by_its_id_or_its_run_the_newest_one() -> None:
    def job(name: str, began: int, command: str) -> Any:
        return SimpleNamespace(submission_id=name, job_id=None, start_time=began, entrypoint=command)

    first, second = (job(f"a-{n}", n, "manta train x --run-dir /shared/a --retries 2") for n in (1, 2))
    cluster: Any = Dashboard([], [second, first, job("b", 3, "manta train y --output-dir /shared")])
    assert find(cluster, "a-1") is first
    assert find(cluster, "/shared/a/") is second
    with pytest.raises(
        ConfigError, match="no job c, and none of a run in that folder; its newest jobs: a-1, a-2, b"
    ):
        find(cluster, "c")


def test_a_job_that_does_not_end_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster: Any = Dashboard([[], [], []])
    with pytest.raises(ConfigError, match="job x has not ended 0 s after it was told to stop"):
        stop(cluster, "x", 0)
    assert cluster.stopped == ["x"]


@pytest.mark.parametrize(
    ("status", "answers", "phase", "failure"),
    [
        ("PENDING", None, "pending", None),
        ("RUNNING", None, "starting", None),  # no folder yet
        ("STOPPED", None, "stopped", None),
        ("FAILED", None, "failed", "manta: the cluster is too small"),
        ("RUNNING", '{"run": "/shared/a", "phase": "training", "step": 3}', "training", None),
        ("RUNNING", '{"run": "/shared/a", "phase": "killed", "step": 3}', "restarting", None),
        ("FAILED", '{"run": "/shared/a", "phase": "killed", "step": 3}', "killed", None),
    ],
)
def test_the_state_of_a_job_is_what_its_run_says_else_what_ray_says(
    monkeypatch: pytest.MonkeyPatch, status: str, answers: str | None, phase: str, failure: str | None
) -> None:
    job = SimpleNamespace(
        submission_id="a-1", job_id=None, start_time=1, entrypoint="manta train x --run-dir /shared/a",
        status=SimpleNamespace(name=status), message="Traceback\nmanta: the cluster is too small", error_type="app",
    )  # fmt: skip
    monkeypatch.setattr(status_command, "connect", lambda address: Dashboard([], [job]))
    monkeypatch.setattr(status_command, "ask", lambda client, job, *command: answers)
    state = status_command.state_of("a-1", None)
    assert (state.phase, state.job, state.job_status, state.run) == (phase, "a-1", status, "/shared/a")
    assert (state.failure and state.failure.message) == failure
    assert state.model_dump(mode="json").keys() == status_command.RunState.model_fields.keys()
