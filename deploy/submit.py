"""Hand a run to a Ray cluster as a job."""

from __future__ import annotations

import shlex
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from ray.job_submission import JobStatus, JobSubmissionClient

from deploy.config import ConfigError, load_config, recipe_text

RECIPE_FILE = "recipe.toml"


def submit(recipe: str, overrides: Sequence[str], address: str, runs: Path) -> tuple[JobSubmissionClient, str]:
    """Check the recipe here, then submit `manta train` of it; returns the client and the job's id.

    Only the recipe's text travels: Manta itself is part of the cluster's image, as vLLM is. `runs` is a path of the
    cluster (shared storage).
    """
    load_config(recipe, overrides)
    arguments = ["manta", "train", RECIPE_FILE, "--runs", str(runs), *overrides]
    try:
        client = JobSubmissionClient(address)
    except ConnectionError as error:
        raise ConfigError(f"no Ray cluster answers at {address}: is its dashboard (port 8265) reachable?") from error
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / RECIPE_FILE).write_text(recipe_text(recipe))
        job = client.submit_job(entrypoint=shlex.join(arguments), runtime_env={"working_dir": folder})
    return client, job


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
    return client.get_job_status(job) == JobStatus.SUCCEEDED
