"""Drives one run from the command line: its lock, its Ray, its display, and a clean end however it ends."""

from __future__ import annotations

import asyncio
import os
import shlex
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from deploy import run_folder
from deploy.config import RunConfig
from deploy.control import driving
from deploy.janitor import LocalRay, prepare_local_ray, start_janitor, tag_run, with_kept_logs
from deploy.progress import Progress
from deploy.ring import Ring
from deploy.supervise import PartFailed
from deploy.train import Training

INTERRUPTED = 130  # what a shell reports for Ctrl-C


def drive(config: RunConfig, folder: Path, console: Console, *, resume: bool, local: bool) -> None:
    """Run to the end and print the outcome. typer.Exit(130) after Ctrl-C or SIGTERM; PartFailed as it is."""
    own_ray = None if local or config.cluster.joins else prepare_local_ray()
    start_janitor(tag_run(), folder, own_ray)
    if not local:
        from deploy.connect import connect, require_capacity

        connect(config, own_ray)
        require_capacity(config)
    if not resume:
        run_folder.create(config, folder)
    with driving(folder), _interruptible():
        try:
            summary = _train(config, folder, console, resume, local)
        except KeyboardInterrupt:
            again = f"manta train --resume {shlex.quote(str(folder))}{' --local' * local}"
            Console(stderr=True, markup=False, highlight=False, soft_wrap=True).print(
                f"stopped; go on with: {again}"
            )
            raise typer.Exit(INTERRUPTED) from None
        except PartFailed as failure:
            raise PartFailed(_kept(str(failure), own_ray, folder)) from failure.__cause__
    _print(summary, folder, console)


def _train(config: RunConfig, folder: Path, console: Console, resume: bool, local: bool) -> dict[str, Any]:
    with Progress(config.steps, f"{config.name}  {folder}", console) as progress:
        ring: Ring
        if local:
            from deploy.local import LocalRing

            ring = LocalRing(config, folder)
        else:
            from deploy.cluster import RayRing

            ring = RayRing(config, folder, say=progress.say)
        return asyncio.run(Training(config, ring, progress).run(resume))


@contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM, which `ray job stop` and a preempted machine send, ends a run as Ctrl-C does."""
    before = signal.signal(signal.SIGTERM, lambda *_: os.kill(os.getpid(), signal.SIGINT))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _kept(text: str, own_ray: LocalRay | None, folder: Path) -> str:
    return text if own_ray is None else with_kept_logs(text, own_ray.temporary, folder)


def _print(summary: dict[str, Any], folder: Path, console: Console) -> None:
    for when in ("before", "after"):
        if summary[f"success_{when}"] is not None:
            low, high = summary[f"success_{when}_interval"]
            console.print(
                f"success {when:6} {summary[f'success_{when}']:.3f}  (95% interval {low:.3f} to {high:.3f})"
            )
    console.print(f"report         {folder / 'report.html'}", highlight=False, markup=False, soft_wrap=True)
