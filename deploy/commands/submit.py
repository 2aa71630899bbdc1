"""Submit a run to a Ray cluster as a job."""

from __future__ import annotations

import os
import re
import secrets
import shlex
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy.config import run_folder
from deploy.config.config import RunConfig
from deploy.config.config_errors import ConfigError
from deploy.config.load import load_config
from deploy.config.own_parts import check_own_parts, importable
from deploy.config.recipe_files import files_of, read_recipe
from deploy.config.toml_text import toml_of
from deploy.config.trust import executed

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

RECIPE_FILE = "recipe.toml"
_OWN = ("envs", "rollout", "learner", "deploy")
_REFERENCE = re.compile(r'"([A-Za-z_]\w*)(?:\.\w+)*:[A-Za-z_][\w.-]*"')  # module:name, as JSON has it


def submit(
    recipe: str,
    overrides: Sequence[str],
    address: str,
    runs: Path,
    working_dir: Path | None = None,
    py_modules: Sequence[Path] = (),
) -> tuple[JobSubmissionClient, str]:
    """Check the recipe here, then submit `manta train` with it; returns the client and the job's id.

    Sent are the recipe with its bases, as one file; or the folder `working_dir`, which holds the recipe's files and is
    the job's working directory; and the packages `py_modules`. Manta and vLLM are part of the cluster's image. runs: a
    path of the cluster (shared storage). The run's folder is named here, so that a restarted job finds its run.
    """
    config = load_config(recipe, overrides)
    # A random suffix: the cluster's disk may not be visible here, and two jobs may be submitted in one second.
    run = runs / f"{run_folder.name(config)}-{secrets.token_hex(3)}"
    named = RECIPE_FILE if working_dir is None else _within(recipe, working_dir)
    require_sent(config, working_dir, py_modules)
    with importable([*([working_dir] if working_dir else []), *(path.parent for path in py_modules)]):
        check_own_parts(config)
    arguments = ["manta", "train", named, "--run-dir", str(run), *overrides]
    client = _client(address)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / RECIPE_FILE).write_text(toml_of(read_recipe(recipe)), encoding="utf-8")
        sent: dict[str, Any] = {"working_dir": str((working_dir or Path(folder)).resolve())}
        if py_modules:
            sent["py_modules"] = [str(each.resolve()) for each in py_modules]
        try:
            job = client.submit_job(entrypoint=shlex.join(arguments), runtime_env=sent)
        except (RuntimeError, ValueError) as error:  # ValueError: a folder that is too large to send
            raise ConfigError(f"the Ray cluster at {address} refused the job: {error}") from error
    return client, job


def require_sent(config: RunConfig, working_dir: Path | None, py_modules: Sequence[Path]) -> None:
    """ConfigError for a recipe with modules that are neither installed nor sent."""
    if working_dir is not None and not working_dir.is_dir():
        raise ConfigError(f"--working-dir {working_dir}: no such folder; check the path")
    for path in py_modules:
        if not path.is_dir() and path.suffix != ".whl":
            raise ConfigError(
                f"--py-modules {path} is neither the folder of a package nor a wheel; check the path"
            )
    for module in dict.fromkeys(name for entry in executed(config) for name in _REFERENCE.findall(entry)):
        there = working_dir is not None and _holds(working_dir, module)
        wheel = any(path.name.startswith(f"{module}-") for path in py_modules)
        if not (
            there or wheel or module in {path.resolve().name for path in py_modules} or _installed(module)
        ):
            raise ConfigError(
                f"module {module}, which the recipe names, is not sent to the cluster: send its folder with "
                "--working-dir FOLDER, or a package with --py-modules FOLDER"
            )


def _holds(folder: Path, module: str) -> bool:
    return (folder / module).is_dir() or (folder / f"{module}.py").is_file()


def _installed(module: str) -> bool:
    """Whether a module is Manta's, Python's or an installed package's, which the cluster's image has to contain."""
    if module in _OWN or module in sys.stdlib_module_names:
        return True
    return any(_holds(Path(sysconfig.get_path(each)), module) for each in ("purelib", "platlib"))


def _within(recipe: str, working_dir: Path) -> str:
    """The path of a recipe relative to `working_dir`, the job's working directory."""
    if not recipe.endswith(".toml"):
        return recipe
    sent = working_dir.resolve()
    for file in files_of(recipe):
        if not file.resolve().is_relative_to(sent):
            raise ConfigError(f"recipe {file} is not sent: put it into --working-dir {working_dir}")
    return str(Path(recipe).resolve().relative_to(sent))


def _client(address: str) -> JobSubmissionClient:
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


def follow(client: JobSubmissionClient, job: str, poll_seconds: float = 1.0) -> Iterator[str]:
    """Yield the job's new output until the job has ended."""
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
    """Whether an ended job succeeded."""
    from ray.job_submission import JobStatus

    return client.get_job_status(job) == JobStatus.SUCCEEDED
