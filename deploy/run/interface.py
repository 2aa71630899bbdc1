"""Manta from a script or a notebook: load a recipe, train, look at what came of it.

    config = load_recipe("frozen_lake", steps=3)
    result = train(config, local=True)

`from deploy import load_recipe, train` imports these, and nothing heavy before they are called.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import pyarrow as pa

from deploy.config import run_folder
from deploy.config.config import RunConfig
from deploy.config.config_errors import ConfigError
from deploy.config.load import load_config
from deploy.report.console import errors, output, silent, write
from deploy.report.metrics import read_metrics
from deploy.run.interrupt import beside_a_loop

RUNS = Path("runs")


@dataclass(frozen=True)
class RunResult:
    """What a run has stored in its folder so far, read when it is asked for."""

    run_dir: Path

    @property
    def config(self) -> RunConfig:
        """The configuration the run was made with."""
        return run_folder.open_existing(self.run_dir)

    @property
    def summary(self) -> dict[str, Any]:
        """Evaluations before and after with their 95% intervals, seconds by phase, the ledger's counts.

        Empty before the run has ended.
        """
        file = self.run_dir / "summary.json"
        return dict(run_folder.read_json(file)) if file.is_file() else {}

    @property
    def metrics(self) -> pa.Table:
        """One row a learner step, one column a metric; null where a step has none."""
        rows = read_metrics(self.run_dir)
        names = list(dict.fromkeys(name for row in rows for name in row))
        return pa.table({name: pa.array([row.get(name) for row in rows], pa.float64()) for name in names})

    @property
    def episodes(self) -> pa.Table:
        """One row a turn of every stored training episode; docs/stored_data.md describes the columns."""
        from rollout.buffer.segments import read_rows

        return read_rows(self.run_dir / "groups")

    @property
    def checkpoints(self) -> list[Path]:
        """Folders of the checkpoints that are kept, oldest first; `model` in each is in Hugging Face format."""
        from learner.training.checkpoint import folder_of, versions

        return [folder_of(self.run_dir, version) for version in versions(self.run_dir)]


def load_recipe(recipe: str | PathLike[str], /, **options: Any) -> RunConfig:
    """Load a recipe (a .toml file, or the name of one that ships with Manta) with options replaced.

    options: by their dotted names, `steps=3` or `**{"env.id": "frozen_lake"}`, as on the command line: a dict replaces
    a whole section, None leaves a section out. Raises ConfigError, one line, for whatever is wrong with them.
    """
    return load_config(fspath(recipe), [f"{name}={_toml(value)}" for name, value in options.items()])


def train(
    config: RunConfig,
    run_dir: str | PathLike[str] | None = None,
    *,
    local: bool = False,
    resume: bool = False,
    quiet: bool = False,
) -> RunResult:
    """Train to the end of the run and return what it stored.

    run_dir: folder of this run; None: a new one in `runs`. local: everything in this process, without Ray. resume: go
    on with the run in run_dir, which must be of this configuration. quiet: show no progress.

    Works where an event loop is running already, as in a notebook. Raises ConfigError for what can be known to be wrong
    before the start, PartFailed, GuardTripped, TooManyFailures and OwnPartError for what ends a run on purpose, Stopped
    for SIGTERM, and KeyboardInterrupt; a run that was interrupted can be resumed.
    """
    folder = None if run_dir is None else Path(run_dir)
    if resume and folder is None:
        raise ConfigError("resume=True goes on with a run: name its folder as run_dir")
    return RunResult(beside_a_loop(lambda: _trained(config, folder, local, resume, quiet)))


def _trained(config: RunConfig, folder: Path | None, local: bool, resume: bool, quiet: bool) -> Path:
    """Check the configuration, run it, and return its folder."""
    from deploy.config.config_checks import config_warnings
    from deploy.config.policies import configurations
    from deploy.run import drive, preflight

    if resume:
        assert folder is not None
        if run_folder.open_existing(folder) != config:
            raise ConfigError(
                f"{folder}: its run has another configuration; load it by RunResult(run_dir).config"
            )
    elif folder is not None and run_folder.exists(folder):
        raise ConfigError(f"{folder}: there is a run already; use another folder, or resume=True")
    if local and config.cluster.address:
        raise ConfigError(
            f"local=True uses no Ray, but cluster.address={config.cluster.address!r}; leave one away"
        )
    for own in configurations(config).values():
        preflight.check(own)
    if not quiet:
        for doubt in config_warnings(config):
            write(errors(), f"note: {doubt}")
    with run_folder.parents_made(folder.parent if folder else RUNS):
        chosen = folder or run_folder.choose(config, RUNS)
        drive.run(drive.Drive(config, chosen, silent() if quiet else output(), resume, local))
    return chosen


def _toml(value: Any) -> str:
    """A value as an override writes it; None is empty, which leaves a section out."""
    if value is None:
        return ""
    if isinstance(value, Mapping):
        pairs = (f"{json.dumps(str(key))} = {_toml(each)}" for key, each in value.items())
        return "{" + ", ".join(pairs) + "}"
    if isinstance(value, str | PathLike):
        return json.dumps(fspath(value), ensure_ascii=False)
    if isinstance(value, Sequence):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, Real):
        return str(value).lower()  # as TOML writes true, 1e-05, nan and inf
    raise ConfigError(
        f"an option may be a number, text, a list or a dict, not {type(value).__name__} ({value!r})"
    )
