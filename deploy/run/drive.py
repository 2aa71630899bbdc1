"""Drives one run from the command line: its lock, its Ray, its display, and a clean end however it ends."""

from __future__ import annotations

import asyncio
import shlex
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import typer

from deploy.assembly.runtime import LearnerLost, Runtime
from deploy.cluster.control import driving
from deploy.cluster.janitor import (
    make_private,
    prepare_local_ray,
    start_janitor,
    tag_run,
    temporary_of,
    with_kept_logs,
)
from deploy.config import run_folder
from deploy.config.config import RunConfig
from deploy.config.config_errors import ConfigError
from deploy.config.policies import configurations, is_several
from deploy.config.supervise import PartFailed, PartLost
from deploy.config.trackers import Tracker
from deploy.report.console import Console, errors, write
from deploy.report.phases import Phases, Startup
from deploy.report.progress import Progress
from deploy.run.failure_log import failures_kept_in
from deploy.run.finished import print_outcome
from deploy.run.interrupt import INTERRUPTED, Stopped, interruptible
from deploy.run.several import train_several
from deploy.run.state import DRIVER_LOG, Recorded
from deploy.run.train import Training
from learner.training.checkpoint import newest_version
from rollout.buffer.state_place import check_state, copy_of


@dataclass(frozen=True)
class Drive:
    """One run to be driven, and how."""

    config: RunConfig
    folder: Path
    console: Console
    resume: bool = False
    local: bool = False
    startup: Startup = field(default_factory=Startup)  # counts what comes before the first episode
    stored: RunConfig | None = None  # the configuration that a run which goes on was found with


def drive(asked: Drive) -> None:
    """`run` for the command line: print the outcome; typer.Exit(130) after Ctrl-C or SIGTERM."""
    folder = asked.folder
    try:
        summary = run(asked)
    except (KeyboardInterrupt, Stopped):
        if not run_folder.exists(folder):  # it was given up before it began
            raise typer.Exit(INTERRUPTED) from None
        again = f"manta train --resume {shlex.quote(str(folder))}{' --local' * asked.local}"
        write(errors(), f"stopped; go on with: {again}")
        raise typer.Exit(INTERRUPTED) from None
    print_outcome(summary, folder, asked.console)


def run(asked: Drive) -> dict[str, Any]:
    """Run to the end; returns the summary. Raises Stopped after SIGTERM; PartFailed and TooManyFailures say where the
    logs are.

    The folder is this process's alone from before anything is written into it.
    """
    config, folder, resume, startup = asked.config, asked.folder, asked.resume, asked.startup
    local = asked.local or config.replay is not None
    if config.policy in config.policies:
        raise ConfigError(
            f"policy {config.policy!r} is one of several: train them together, or go on with the run of all of them"
        )
    alone = local or not config.cluster.joins  # nothing of the run is on another machine
    run_folder.make(folder)
    with driving(folder), run_folder.removed_unless_begun(folder):
        _require_unchanged(folder, resume, asked.stored)
        if not run_folder.make_private(folder):
            write(errors(), f"note: other users can read {folder}, and it cannot be made private")
        if config.replay is None:
            _check_buffer(config, folder, resume)
        tag = tag_run()
        temporary = temporary_of(tag) if alone else None
        start_janitor(tag, folder, temporary)  # before there is anything to be removed
        if temporary is not None:
            make_private(temporary)
        if not local:
            with startup.timed("ray"):
                _connect(config, alone, temporary)
        if not resume or config != run_folder.open_existing(folder):
            run_folder.store(config, folder)  # of one that is resumed: it goes on elsewhere, from now on
        with _logs_kept(folder, alone), Recorded(folder) as record:
            try:
                with failures_kept_in(folder):
                    return _train(asked, local, Phases(record.enter))
            except (PartFailed, PartLost, LearnerLost) as failure:
                # A loss comes here only where nothing can go on, as in the start.
                raise PartFailed(_kept(str(failure), temporary, folder)) from failure.__cause__


def _logs_kept(folder: Path, alone: bool) -> AbstractContextManager[None]:
    """The logs of a cluster's nodes in the run's folder; those of a local Ray are moved there when it ends."""
    if alone:
        return nullcontext()
    from deploy.cluster.node_logs import logs_kept_in

    return logs_kept_in(folder, lambda text: write(errors(), text))


def _check_buffer(config: RunConfig, folder: Path, resume: bool) -> None:
    """Check the state of the replay buffer of each policy."""
    for name, own in configurations(config).items():
        place = run_folder.of_policy(folder, name) if is_several(config) else folder
        if place.is_dir():
            check_state(place, own.buffer, newest_version(place) if resume else None)
    if config.cluster.buffer_resources and not copy_of(folder, config.buffer.copy_to):
        raise ConfigError(
            f"cluster.buffer_resources may place the replay buffer on another node, but {folder} has its state without "
            "a copy; set buffer.copy_to=run, with a run folder that all nodes share"
        )


def _connect(config: RunConfig, alone: bool, temporary: Path | None) -> None:
    if alone:
        prepare_local_ray()
    from deploy.cluster.connect import connect, require_capacity

    connect(config, temporary)
    require_capacity(list(configurations(config).values()))


def _require_unchanged(folder: Path, resume: bool, stored: RunConfig | None) -> None:
    """What was looked at before the folder was ours is still so."""
    if not resume and run_folder.exists(folder):
        raise ConfigError(f"{folder}: another run was begun there meanwhile; go on with it by --resume")
    if resume and stored is not None and run_folder.open_existing(folder) != stored:
        raise ConfigError(f"{folder}: its configuration was changed meanwhile; say it again")


def _train(asked: Drive, local: bool, phases: Phases) -> dict[str, Any]:
    config, folder, startup = asked.config, asked.folder, asked.startup
    make_ring: Callable[..., Runtime]
    exporter: Callable[[], Tracker] | None = None
    if local:
        from deploy.run.local import LocalRuntime

        make_ring = LocalRuntime
    else:
        from deploy.cluster.cluster import RayRuntime
        from deploy.cluster.exporter import RayMetrics

        make_ring, exporter = partial(RayRuntime, asked_in=folder), RayMetrics
    if is_several(config):
        several = train_several(
            config, folder, asked.console, asked.resume, phases, make_ring=make_ring, exporter=exporter
        )
        return asyncio.run(interruptible(several))
    title = f"{config.name}  {folder}"
    with Progress(config.steps, title, asked.console, folder / DRIVER_LOG) as progress:
        if config.replay is not None:
            from deploy.run.replay import ReplayRuntime

            ring: Runtime = ReplayRuntime(config, folder)
        else:
            ring = make_ring(config, folder, startup=startup, say=progress.say)
        exporters = [] if exporter is None else [exporter()]
        training = Training(config, ring, progress, startup, phases, exporters)
        return asyncio.run(interruptible(training.run(asked.resume)))


def _kept(text: str, temporary: Path | None, folder: Path) -> str:
    return text if temporary is None else with_kept_logs(text, temporary, folder)
