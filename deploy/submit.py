"""Hand a run to a Ray cluster as a job."""

from __future__ import annotations

import os
import secrets
import shlex
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from deploy import run_folder
from deploy.config import ConfigError, load_config, recipe_text

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

RECIPE_FILE = "recipe.toml"


def submit(
    recipe: str, overrides: Sequence[str], address: str, runs: Path
) -> tuple[JobSubmissionClient, str]:
    """Check the recipe here, then submit `manta train` of it; returns the client and the job's id.

    Only the recipe's text travels: Manta itself is part of the cluster's image, as vLLM is. `runs` is a path of the
    cluster (shared storage). The run's folder is named here, so that a job that is started again finds its run.
    """
    config = load_config(recipe, overrides)
    # The cluster's disk may be out of sight: two submitted in one second are told apart by chance.
    run = runs / f"{run_folder.name(config)}-{secrets.token_hex(3)}"
    arguments = ["manta", "train", RECIPE_FILE, "--run", str(run), *overrides]
    client = _client(address)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / RECIPE_FILE).write_text(recipe_text(recipe), encoding="utf-8")
        try:
            job = client.submit_job(entrypoint=shlex.join(arguments), runtime_env={"working_dir": folder})
        except RuntimeError as error:
            raise ConfigError(f"the Ray cluster at {address} did not take the job: {error}") from error
    return client, job


def _client(address: str) -> JobSubmissionClient:
    # Ray's client shows the token it has only when told to, and reads that setting when Ray is first imported.
    token_file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", Path.home() / ".ray" / "auth_token"))
    if "RAY_AUTH_TOKEN" in os.environ or token_file.is_file():
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    try:
        return JobSubmissionClient(address)
    except ConnectionError as error:
        raise ConfigError(
            f"no Ray cluster answers at {address}: is its dashboard (port 8265) reachable?"
        ) from error
    except AuthenticationError as error:
        raise ConfigError(
            f"the Ray cluster at {address} wants a token: put it into RAY_AUTH_TOKEN or {token_file}"
        ) from error


def follow(client: JobSubmissionClient, job: str, poll_seconds: float = 1.0) -> Iterator[str]:
    """Yield the job's output as it comes, until the job has ended."""
    shown = 0
    while True:
        ended = client.get_job_status(job).is_terminal()
        output = client.get_job_logs(job)
        yield output[shown:]
        shown = len(output)
        if ended:
            return
        time.sleep(poll_seconds)


def succeeded(client: JobSubmissionClient, job: str) -> bool:
    """Whether an ended job ended well."""
    from ray.job_submission import JobStatus

    return client.get_job_status(job) == JobStatus.SUCCEEDED
