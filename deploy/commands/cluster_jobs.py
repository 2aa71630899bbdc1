"""Jobs of a Ray cluster by its Jobs API, from any machine that reaches its dashboard: found, followed, stopped."""

from __future__ import annotations

import asyncio
import os
import shlex
import time
from collections.abc import Iterator
from contextlib import suppress
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING

from deploy.config.config_errors import ConfigError

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

ADDRESS = "http://127.0.0.1:8265"
# How long a cluster may take to start a job that only reads, and how long one may be away while a job is followed.
ASK_SECONDS, AWAY_SECONDS = 120.0, 60.0
_POLL_SECONDS = 1.0
_RAY_SAYS = "Running entrypoint for job "  # before the output, with the job's id and its command
# Of a job's environment, what its interpreter is: a job that only reads needs nothing else of it.
_INTERPRETER = ("uv", "pip", "conda", "py_executable", "image_uri")


def connect(address: str | None) -> JobSubmissionClient:
    """A client of the cluster's dashboard, by default that of `default_address`.

    ConfigError if none answers, or it wants a token.
    """
    address = address or default_address()
    # Ray's client sends its token only if RAY_AUTH_MODE says so, which is read at the first import of Ray.
    token_file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path("~/.ray/auth_token"))
    with suppress(RuntimeError):  # a user without a home folder has no token file
        token_file = token_file.expanduser()
    if "RAY_AUTH_TOKEN" in os.environ or token_file.is_file():
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    try:
        return JobSubmissionClient(address)
    except ConnectionError as error:
        raise ConfigError(
            f"no Ray cluster answers at {address}; check the address and that its dashboard (port 8265) is reachable"
        ) from error
    except AuthenticationError as error:
        raise ConfigError(
            f"the Ray cluster at {address} requires a token; put it into RAY_AUTH_TOKEN or {token_file}"
        ) from error


def default_address() -> str:
    """The dashboard that Ray's own commands take, else that of this machine."""
    return os.environ.get("RAY_API_SERVER_ADDRESS") or ADDRESS


def find(client: JobSubmissionClient, target: str) -> JobDetails:
    """The job of that id, or the newest one of the run in that folder. ConfigError if the cluster has none."""
    jobs = [job for job in client.list_jobs() if job.submission_id]
    found = [job for job in jobs if target in (job.submission_id, job.job_id)]
    found = found or [job for job in jobs if run_of(job) == os.path.normpath(target)]
    if not found:
        known = ", ".join(str(job.submission_id) for job in sorted(jobs, key=_began)[-5:]) or "none"
        raise ConfigError(
            f"the cluster has no job {target}, and none of a run in that folder; its newest jobs: {known}"
        )
    return max(found, key=_began)


def run_of(job: JobDetails) -> str | None:
    """The folder of a job's run, as its command names it; None where it does not."""
    words = shlex.split(job.entrypoint)
    for flag in ("--run-dir", "--resume"):
        for word, following in zip(words, [*words[1:], ""], strict=True):
            if word == flag:
                return os.path.normpath(following)
            if word.startswith(f"{flag}="):
                return os.path.normpath(word.partition("=")[2])
    return None


def follow(client: JobSubmissionClient, job: str) -> Iterator[str]:
    """Yield the job's output from its beginning until the job has ended.

    A connection that breaks is made again, and the output goes on where it was. ConfigError if the cluster is away for
    AWAY_SECONDS.
    """
    from aiohttp import ClientError

    shown, away = 0, 0.0
    while True:
        seen, ended = 0, False
        try:
            ended = client.get_job_status(job).is_terminal()
            for text in _tail(client, job):
                away, before = 0.0, max(shown - seen, 0)
                seen += len(text)
                yield text[before:]
                shown = max(shown, seen)
        except (RuntimeError, ConnectionError, ClientError) as error:
            away += _POLL_SECONDS
            if away > AWAY_SECONDS:
                raise ConfigError(
                    f"the cluster of job {job} has not answered for {AWAY_SECONDS:g} s ({error}); the job may go on: "
                    f"manta logs {job}"
                ) from error
        if ended:
            return
        time.sleep(_POLL_SECONDS)


def _tail(client: JobSubmissionClient, job: str) -> Iterator[str]:
    """The output of one connection, to the end of it."""
    with asyncio.Runner() as runner:
        chunks = client.tail_job_logs(job)
        try:
            while (text := runner.run(anext(chunks, None))) is not None:
                yield text
        finally:
            runner.run(chunks.aclose())


def succeeded(client: JobSubmissionClient, job: str) -> bool:
    """Whether an ended job succeeded."""
    from ray.job_submission import JobStatus

    return client.get_job_status(job) == JobStatus.SUCCEEDED


def stop(client: JobSubmissionClient, job: str, seconds: float) -> None:
    """Tell a job to stop as SIGTERM does, and wait until it has. ConfigError if it has not within `seconds`."""
    client.stop_job(job)
    deadline = time.monotonic() + seconds
    while not client.get_job_status(job).is_terminal():
        if time.monotonic() > deadline:
            raise ConfigError(
                f"job {job} has not ended {seconds:g} s after it was told to stop; see manta logs {job}"
            )
        time.sleep(_POLL_SECONDS)


def ask(client: JobSubmissionClient, job: JobDetails, *command: str) -> str | None:
    """What a `manta` command with `--here` says on the cluster, by a small job of its own; None where it fails.

    The run's folder lies on the cluster's file system, which this machine may not see. ConfigError if the cluster does
    not run the small job within ASK_SECONDS.
    """
    environment = {name: value for name, value in (job.runtime_env or {}).items() if name in _INTERPRETER}
    manta = list(takewhile(lambda word: word != "train", shlex.split(job.entrypoint)))
    asked = client.submit_job(entrypoint=shlex.join([*manta, *command, "--here"]), runtime_env=environment)
    deadline = time.monotonic() + ASK_SECONDS
    while not (status := client.get_job_status(asked)).is_terminal():
        if time.monotonic() > deadline:
            client.stop_job(asked)
            raise ConfigError(f"the cluster did not run `{shlex.join(command)}` within {ASK_SECONDS:g} s")
        time.sleep(_POLL_SECONDS / 4)
    said = client.get_job_logs(asked)
    client.delete_job(asked)
    _, _, answer = said.partition(f"{_RAY_SAYS}{asked}")
    return answer.partition("\n")[2] if status.name == "SUCCEEDED" else None


def _began(job: JobDetails) -> int:
    return job.start_time or 0
