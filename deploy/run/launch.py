"""What `manta train` is asked for, settled before anything is started: a new run, or one that goes on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.config import run_folder
from deploy.config.config import RunConfig
from deploy.config.config_errors import ConfigError
from deploy.config.load import load_config, moved
from deploy.config.policies import configurations
from deploy.config.trust import executed, require_trust
from deploy.report.console import Console, errors, write
from deploy.report.phases import Startup, since_command
from deploy.run.finished import told_finished

RUNS = Path("runs")


@dataclass(frozen=True)
class TrainRequest:
    """The command line of `manta train`; None and empty: not said."""

    recipe: str = ""
    overrides: Sequence[str] = ()
    resume: Path | None = None
    run_dir: Path | None = None
    output_dir: Path | None = None
    replay: Path | None = None
    local: bool = False
    trust: bool = False


def launch(asked: TrainRequest, console: Console) -> None:
    """Train as asked. ConfigError where the arguments contradict one another or the run that they name."""
    _require_meant(asked)
    if asked.resume is not None:
        # The first override stands where a recipe would.
        changes = [asked.recipe, *asked.overrides] if asked.recipe else []
        _go_on(asked.resume, changes, asked, console)
    elif asked.run_dir is not None and run_folder.exists(asked.run_dir):
        _go_on(asked.run_dir, (), asked, console, _wanted(asked))
    else:
        _begin(asked, console)


def _require_meant(asked: TrainRequest) -> None:
    """Refuse arguments that would be ignored."""
    if asked.resume is not None:
        if asked.recipe and "=" not in asked.recipe:
            raise ConfigError("--resume goes on with a run as it was configured: leave the recipe away")
        for name, value in (
            ("--run-dir", asked.run_dir),
            ("--output-dir", asked.output_dir),
            ("--replay", asked.replay),
        ):
            if value is not None:
                raise ConfigError(f"--resume goes on with the run in its folder: leave {name} {value} away")
    elif not asked.recipe:
        raise ConfigError("name a recipe (see deploy/recipes) or a run to --resume")
    elif asked.run_dir is not None and asked.output_dir is not None:
        raise ConfigError(
            f"--run-dir {asked.run_dir} is the run's folder itself, --output-dir {asked.output_dir} where a "
            "new one is made: leave --output-dir away"
        )


def _wanted(asked: TrainRequest) -> RunConfig:
    """The configuration that recipe, overrides and --replay say."""
    past = [] if asked.replay is None else [f"replay={str(asked.replay.resolve())!r}"]
    return load_config(asked.recipe, [*asked.overrides, *past])


def _begin(asked: TrainRequest, console: Console) -> None:
    from deploy.config.config_checks import config_warnings
    from deploy.run import drive, preflight

    startup = Startup()
    startup.add("imports", since_command())
    config = _wanted(asked)
    _require_local(config, asked)
    with startup.timed("preflight"):
        for own in configurations(config).values():
            preflight.check(own)
    for doubt in config_warnings(config):
        write(errors(), f"note: {doubt}")
    parent = asked.run_dir.parent if asked.run_dir else asked.output_dir or RUNS
    with run_folder.parents_made(parent):
        folder = asked.run_dir or run_folder.choose(config, parent)
        drive.drive(drive.Drive(config, folder, console, local=asked.local, startup=startup))


def _go_on(
    folder: Path,
    changes: Sequence[str],
    asked: TrainRequest,
    console: Console,
    wanted: RunConfig | None = None,
) -> None:
    """wanted: what the user's own recipe says, which is his word for what it executes; the run must be the same."""
    stored = run_folder.open_existing(folder)
    config = moved(stored, changes)
    own = [] if wanted is None else executed(wanted)
    given = set(executed(config)) - set(executed(stored))  # by the user, just now
    asks = [] if own == executed(config) else [each for each in executed(config) if each not in given]
    require_trust(folder, asks, asked.trust)
    if wanted is not None:
        _require_same(wanted, stored, folder)
    _require_local(config, asked)
    if told_finished(config, folder, console):
        return
    from deploy.run import drive

    startup = Startup()
    startup.add("imports", since_command())
    if config.steps > stored.steps:
        schedule = config.learner.optim.schedule
        falling = (
            "" if schedule == "constant" else f", where the {schedule} schedule of the learning rate ends now"
        )
        write(errors(), f"note: goes on to step {config.steps} instead of {stored.steps}{falling}")
    drive.drive(drive.Drive(config, folder, console, True, asked.local, startup, stored))


def _require_local(config: RunConfig, asked: TrainRequest) -> None:
    if asked.local and config.cluster.address:
        raise ConfigError(
            f"--local runs everything in this process, but cluster.address={config.cluster.address!r} names a Ray "
            "cluster: leave --local away, or say cluster.address="
        )


def _require_same(wanted: RunConfig, stored: RunConfig, folder: Path) -> None:
    """A run goes on only under the configuration it has: what differs is named."""
    differing = list(_differences(wanted.model_dump(mode="json"), stored.model_dump(mode="json"), ""))
    if not differing:
        return
    shown = "; ".join(differing[:5]) + (f"; and {len(differing) - 5} more" if len(differing) > 5 else "")
    raise ConfigError(
        f"--run-dir {folder} is a run of another configuration: {shown}; name another folder, or go on with it as it "
        f"is: manta train --resume {folder}"
    )


def _differences(wanted: Any, stored: Any, name: str) -> list[str]:
    """Options that differ, each with both values."""
    if isinstance(wanted, dict) and isinstance(stored, dict):
        names = {**stored, **wanted}
        return [
            each
            for key in names
            for each in _differences(wanted.get(key), stored.get(key), f"{name}.{key}" if name else key)
        ]
    return [] if wanted == stored else [f"{name} is {_short(stored)} there and {_short(wanted)} here"]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
