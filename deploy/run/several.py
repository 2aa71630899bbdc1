"""A run of several policies: one process drives a ring of each, which cross a line together.

    RUN/policies/NAME    what a run of one policy leaves, of each: ledger, rows, checkpoints, metrics, report
    RUN/summary.json     the summary of each, by its name

Each policy is driven as a run of one policy is (train.py), in this process or on Ray. Before the slots of a step are
released, all wait until every policy has published the version that the step made: so the versions of all are of the
same steps, and a group that is issued at a version may meet that version of any policy. The first failure ends all.
"""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from deploy.assembly.build import EngineFactory, start_engine
from deploy.assembly.league import League, Member
from deploy.assembly.runtime import Runtime
from deploy.config import run_folder
from deploy.config.config import RunConfig
from deploy.config.policies import configurations
from deploy.config.trackers import Tracker
from deploy.report.console import Console
from deploy.report.phases import Phases, Startup
from deploy.report.progress import Progress
from deploy.run.local import LocalRuntime
from deploy.run.state import DRIVER_LOG
from deploy.run.train import Training
from learner.training.checkpoint import CheckpointError, complete, version_of, whole
from rollout.wire.whole_file import replace_file


class Line:
    """A line that several policies cross together, version by version."""

    def __init__(self, policies: Sequence[str]) -> None:
        self._policies = frozenset(policies)
        self._here: dict[str, int] = {}  # who waits, with which version
        self._crossed = -1
        self._changed = asyncio.Event()

    async def cross(self, policy: str, version: int) -> None:
        """Wait until every policy has come with this version; one that was crossed before is passed at once.

        A policy that is late fails by its own time limits. Raises RuntimeError if they come with different versions.
        """
        if version <= self._crossed:  # a learner that was lost makes its steps again
            return
        self._here[policy] = version
        try:
            await self._all_here(version)
        finally:
            self._here.pop(policy, None)  # a learner that is lost while it waits comes again

    async def _all_here(self, version: int) -> None:
        if self._here.keys() == self._policies:
            if len(set(self._here.values())) > 1:
                raise RuntimeError(f"the run's policies stand at different versions: {self._here}")
            self._here, self._crossed = {}, version
            changed, self._changed = self._changed, asyncio.Event()
            changed.set()
        else:
            await self._changed.wait()


async def train_several(
    config: RunConfig,
    folder: Path,
    console: Console,
    resume: bool,
    phases: Phases | None = None,
    engine_factory: EngineFactory = start_engine,
    make_ring: Callable[..., Runtime] = LocalRuntime,
    exporter: Callable[[], Tracker] | None = None,
) -> dict[str, Any]:
    """Drive all policies to the end of the run; returns the summary of each, by name. Raises the first failure.

    make_ring: LocalRuntime, or RayRuntime. exporter: makes a tracker for each policy besides the recipe's.
    """
    configs = configurations(config)
    folders = {name: run_folder.of_policy(folder, name) for name in configs}
    resumed = resume and all(map(run_folder.exists, folders.values()))
    if resumed:
        go_back_to_common_version(folders)
    for name, own in configs.items():
        run_folder.create(own, folders[name])
    league = League({name: Member(configs[name], folders[name]) for name in configs})
    line = Line(list(configs))

    async def drive(name: str) -> dict[str, Any]:
        own, startup = configs[name], Startup()
        with Progress(
            own.steps, f"{own.name}  {folders[name]}", console, folder / DRIVER_LOG, prefix=name
        ) as progress:
            ring = make_ring(
                own,
                folders[name],
                engine_factory,
                startup=startup,
                say=progress.say,
                league=league,
                met=partial(line.cross, name),
            )
            trackers = [] if exporter is None else [exporter()]
            return await Training(own, ring, progress, startup, trackers=trackers).run(resumed)

    try:
        with (phases or Phases()).timed("training"):
            async with asyncio.TaskGroup() as group:
                driven = {name: group.create_task(drive(name), name=f"policy {name}") for name in configs}
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None
    summary = {
        run_folder.POLICIES: {name: task.result() for name, task in driven.items()},
        "steps": config.steps,
    }
    replace_file(folder / "summary.json", json.dumps(summary, indent=2))
    return summary


def go_back_to_common_version(folders: Mapping[str, Path]) -> None:
    """Remove checkpoints that are newer than the newest version of which every policy has a whole one.

    A run that was stopped between the checkpoints of two policies makes the newer steps again.
    """
    common = set.intersection(*(_whole_versions(each) for each in folders.values()))
    newest = max(common, default=-1)
    for each in folders.values():
        for checkpoint in complete(each / "checkpoints"):
            if version_of(checkpoint) > newest:
                shutil.rmtree(checkpoint)


def _whole_versions(folder: Path) -> set[int]:
    found = set()
    for checkpoint in complete(folder / "checkpoints"):
        try:
            whole(folder, version_of(checkpoint))
        except CheckpointError:
            continue
        found.add(version_of(checkpoint))
    return found
