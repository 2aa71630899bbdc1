"""Drives one run from the command line: its lock, its Ray, its display, and a clean end however it ends."""

from __future__ import annotations

import asyncio
import shlex
import signal
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

import typer

from deploy import run_folder
from deploy.config import RunConfig
from deploy.console import Console, errors, write
from deploy.control import driving
from deploy.evaluation import WHEN, said
from deploy.janitor import (
    make_private,
    prepare_local_ray,
    start_janitor,
    tag_run,
    temporary_of,
    with_kept_logs,
)
from deploy.progress import Progress
from deploy.ring import Ring
from deploy.supervise import PartFailed
from deploy.train import Training
from learner.checkpoint import newest_version
from rollout.wire.ledger_checks import LEDGER, check_ledger

T = TypeVar("T")

INTERRUPTED = 130  # what a shell reports for Ctrl-C


class Stopped(Exception):
    """SIGTERM came."""


def drive(config: RunConfig, folder: Path, console: Console, *, resume: bool, local: bool) -> None:
    """Run to the end and print the outcome. typer.Exit(130) after Ctrl-C or SIGTERM; PartFailed as it is."""
    local = local or config.replay is not None
    alone = local or not config.cluster.joins  # nothing of the run is on another machine
    run = tag_run()
    temporary = temporary_of(run) if alone else None
    start_janitor(run, folder, temporary)  # before there is anything to be removed
    if temporary is not None:
        make_private(temporary)
    if not local:
        if alone:
            prepare_local_ray()
        from deploy.connect import connect, require_capacity

        connect(config, temporary)
        require_capacity(config)
    if not resume:
        run_folder.create(config, folder)
    if not run_folder.make_private(folder):
        write(errors(), f"note: other users can read {folder}, and it cannot be made private")
    with driving(folder):
        if resume and config.replay is None and (folder / LEDGER).is_file():
            check_ledger(folder / LEDGER, newest_version(folder), config.buffer.groups_per_step)
        if resume and config != run_folder.open_existing(folder):
            run_folder.store(config, folder)  # it goes on elsewhere, from now on
        try:
            summary = _train(config, folder, console, resume, local)
        except (KeyboardInterrupt, Stopped):
            again = f"manta train --resume {shlex.quote(str(folder))}{' --local' * local}"
            write(errors(), f"stopped; go on with: {again}")
            raise typer.Exit(INTERRUPTED) from None
        except PartFailed as failure:
            raise PartFailed(_kept(str(failure), temporary, folder)) from failure.__cause__
    _print(summary, folder, console)


def _train(config: RunConfig, folder: Path, console: Console, resume: bool, local: bool) -> dict[str, Any]:
    with Progress(config.steps, f"{config.name}  {folder}", console) as progress:
        ring: Ring
        if config.replay is not None:
            from deploy.replay import ReplayRing

            ring = ReplayRing(config, folder)
        elif local:
            from deploy.local import LocalRing

            ring = LocalRing(config, folder)
        else:
            from deploy.cluster import RayRing

            ring = RayRing(config, folder, say=progress.say)
        return asyncio.run(_interruptible(Training(config, ring, progress).run(resume)))


async def _interruptible(work: Coroutine[Any, Any, T]) -> T:
    """SIGTERM, which `ray job stop` and a preempted machine send, ends a run as Ctrl-C does."""
    task = asyncio.current_task()
    assert task is not None
    # Not by way of SIGINT: a process in the background may have been told to ignore that one.
    told = asyncio.Event()

    def stop() -> None:
        told.set()
        task.cancel()

    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop)
    try:
        return await work
    except asyncio.CancelledError:
        if told.is_set():
            raise Stopped from None
        raise


def _kept(text: str, temporary: Path | None, folder: Path) -> str:
    return text if temporary is None else with_kept_logs(text, temporary, folder)


def _print(summary: dict[str, Any], folder: Path, console: Console) -> None:
    for when in WHEN:
        name = "reward" if summary[f"success_{when}"] is None else "success"
        if (value := summary[f"{name}_{when}"]) is not None:
            write(console, said(f"{name} {when:6}", value, summary[f"{name}_{when}_interval"]))
    write(console, f"report         {folder / 'report.html'}")
