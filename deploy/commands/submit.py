"""Submit a run to a Ray cluster as a job."""

from __future__ import annotations

import os
import secrets
import shlex
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from deploy.commands.cluster_jobs import connect, default_address
from deploy.commands.runtime_env import parents, recipe_within, require_sent, runtime_env
from deploy.config import run_folder
from deploy.config.config_errors import ConfigError
from deploy.config.load import load_config
from deploy.config.own_parts import check_own_parts, importable
from deploy.config.recipe_files import read_recipe
from deploy.config.toml_text import toml_of

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

RECIPE_FILE = "recipe.toml"
# Ray kills a job that it was told to stop after three seconds, unless its environment says otherwise.
STOP_SECONDS = "RAY_JOB_STOP_WAIT_TIME_S"
LONGEST_STOP_SECONDS = 120


def submit(
    recipe: str,
    overrides: Sequence[str],
    address: str | None,
    runs: Path,
    working_dir: Path | None = None,
    py_modules: Sequence[Path] = (),
    env_vars: Sequence[str] = (),
    environment: Path | None = None,
    retries: int = 0,
    run_dir: Path | None = None,
) -> tuple[JobSubmissionClient, str]:
    """Check the recipe here, then submit `manta train` with it; returns the client and the job's id.

    Sent are the recipe with its bases, as one file; or the folder `working_dir`, which holds the recipe's files and is
    the job's working directory; the packages `py_modules`; and the runtime environment in the file `environment`, with
    the variables `env_vars`. Manta and vLLM are part of the cluster's image. runs: a path of the cluster (shared
    storage). The run's folder is named here, so that a restarted job finds its run; the job has the same name.
    run_dir: that folder, in which a job goes on with the run that is there; the job's name has a suffix then.
    """
    config = load_config(recipe, overrides)
    # A random suffix: the cluster's disk may not be visible here, and two jobs may be submitted in one second.
    suffix = secrets.token_hex(3)
    name = f"{run_dir.name if run_dir else run_folder.name(config)}-{suffix}"
    sent = runtime_env(environment, working_dir, py_modules, env_vars, dict(os.environ))
    named = recipe_within(recipe, sent) if sent.working_dir or sent.is_elsewhere else RECIPE_FILE
    require_sent(config, sent)
    if not sent.installs:  # else what is named may be nowhere here
        with importable([*parents(sent)]):
            check_own_parts(config)
    arguments = [*sent.command, "train", named, "--run-dir", str(run_dir or runs / name), *overrides]
    if retries:
        arguments += ["--retries", str(retries)]
    client = connect(address)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / RECIPE_FILE).write_text(toml_of(read_recipe(recipe)), encoding="utf-8")
        content = {"working_dir": folder, **sent.content}
        content["env_vars"] = {STOP_SECONDS: str(LONGEST_STOP_SECONDS)} | content.get("env_vars", {})
        try:
            job = client.submit_job(
                entrypoint=shlex.join(arguments), runtime_env=content, submission_id=_id(name)
            )
        except (RuntimeError, ValueError) as error:  # ValueError: a folder that is too large to send
            raise ConfigError(
                f"the Ray cluster at {address or default_address()} refused the job: {error}"
            ) from error
    return client, job


def _id(name: str) -> str:
    """A job's id: letters, digits, - and _ of a run's name."""
    return "".join(each if each.isascii() and (each.isalnum() or each in "-_") else "-" for each in name)
