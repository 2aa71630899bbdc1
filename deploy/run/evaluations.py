"""The evaluations of a run as its driver plays them: before its stages, and before, during and after training.

Each has all suites.

    tasks of every suite -> played at the published version -> evaluation.json beside the rows, metrics, best checkpoint

During training the evaluation of a step is played while the next step is learned; `Runtime.step` publishes that one
when the evaluation has ended, so that all its tokens are of one version.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path

from deploy.assembly.build import identical_starts
from deploy.assembly.runtime import Runtime
from deploy.assembly.suites import Suite, suites_of
from deploy.config.config import RunConfig
from deploy.config.evaluation import prefix
from deploy.config.trackers import Trackers
from deploy.report.evaluation import BASE, FILE, WHEN, Evaluation
from deploy.report.metrics import MetricsLog
from deploy.report.phases import Phases, Startup
from deploy.report.progress import Progress
from learner.training.checkpoint import note_best
from rollout.wire.metrics import Row, joined
from rollout.wire.trajectory import Task

Results = Mapping[str, Evaluation]  # by suite; "" is the run's own evaluation
FOLDER = "evaluations"


@dataclass
class Evaluations:
    """Plays the evaluations of one run and stores what they come to."""

    config: RunConfig
    ring: Runtime
    progress: Progress
    trackers: Trackers
    startup: Startup
    phases: Phases
    _suites: list[Suite] = field(init=False)
    _tasks: asyncio.Future[list[list[list[Task]]]] = field(init=False)  # by suite and set
    _first: bool = True  # nothing was played yet

    def __post_init__(self) -> None:
        self._suites = [] if self.config.replay else suites_of(self.config)

    def begin(self) -> None:
        """Find out which tasks there are, while the parts start."""
        self._tasks = asyncio.ensure_future(self._look_at_tasks())
        self._tasks.add_done_callback(lambda done: done.cancelled() or done.exception())  # it may go unasked

    def stop(self) -> None:
        self._tasks.cancel()

    def due(self, step: int) -> bool:
        """Whether an evaluation follows this step; after the last one there is one in any case."""
        every = self.config.evaluation.every_steps
        return bool(self._suites and every) and step % every == 0 and step < self.config.steps

    def missing(self, step: int) -> bool:
        """Whether the evaluation after this step was due, and has not been stored."""
        return step > 0 and self.due(step) and self.stored(step_name(step)) is None

    def stored(self, when: str) -> Results | None:
        """The results that the run has stored; None unless there is one of every suite."""
        paths = {suite.name: self._file(suite, when) for suite in self._suites}
        if not all(path.is_file() for path in paths.values()):
            return None
        return {name: Evaluation.load(path) for name, path in paths.items()}

    async def play(
        self, when: str, version: int, stored_after: asyncio.Future[None] | None = None
    ) -> Results:
        """Evaluate the published version on every suite, and store the results when `stored_after` is done."""
        tasks = await self._tasks
        if self._first and when in (BASE, "before"):
            await self._say_identical_starts(tasks)
        self._first = False
        self.startup.episodes_begin()
        results = {}
        with self.phases.timed(f"evaluate_{when}") if when in WHEN else nullcontext():
            for suite, own in zip(self._suites, tasks, strict=True):
                results[suite.name] = await self._play(suite, own, when)
        if stored_after is not None:
            await stored_after
        if results:
            self._store(results, when, version)
        return results

    async def _play(self, suite: Suite, tasks: list[list[Task]], when: str) -> Evaluation:
        name, plan = suite.folder(when), suite.plan
        # What an attempt left that ended on its way: its rows would be counted beside these.
        shutil.rmtree(self.ring.run_folder / FOLDER / name, ignore_errors=True)
        played = {
            of.environment.name: await self.ring.evaluate(own, name, plan)
            for of, own in zip(suite.sets, tasks, strict=True)
        }
        apart = [of.environment.name for of in suite.sets if of.held_out]
        evaluation = Evaluation.of_environments(played, apart, plan.samples, plan.majority != "none")
        self.progress.say(f"{name}: {evaluation}")
        for environment, result in evaluation.environments.items():
            self.progress.say(f"{name}, {environment}: {result}")
        self.trackers.tell("on_eval", name, asdict(evaluation))
        return evaluation

    def _store(self, results: Results, when: str, version: int) -> None:
        """Store the results, their metrics, and whether the version is the best so far."""
        folder = self.ring.run_folder
        for suite in self._suites:
            path = self._file(suite, when)
            path.parent.mkdir(parents=True, exist_ok=True)
            results[suite.name].save(path)
        if when == BASE:  # no version of the run: it has no row of metrics, and no checkpoint to be the best
            return
        row = joined(*(_metrics(name, result) for name, result in results.items()))
        log = MetricsLog(folder / FOLDER, resume_after=version - 1)
        log.write(version, row)
        log.close()
        best = self.config.checkpoint.best_metric
        if best in row and note_best(folder, version, best, row[best]):
            self.progress.say(f"version {version} is the best so far: {best} {row[best]:.3f}")

    def _file(self, suite: Suite, when: str) -> Path:
        """Where a result lies: beside its rows; that of the run's own first and last evaluation in the run folder."""
        folder = self.ring.run_folder
        if when in WHEN and not suite.name:
            return folder / f"evaluation_{when}.json"
        return folder / FOLDER / suite.folder(when) / FILE

    async def _look_at_tasks(self) -> list[list[list[Task]]]:
        if not self._suites:
            return []
        with self.startup.timed("evaluation_tasks"):
            return await asyncio.to_thread(
                lambda: [[of.tasks() for of in suite.sets] for suite in self._suites]
            )

    async def _say_identical_starts(self, tasks: list[list[list[Task]]]) -> None:
        for suite, sets in zip(self._suites, tasks, strict=True):
            for of, own in zip(suite.sets, sets, strict=True):
                if told := await asyncio.to_thread(identical_starts, own, of.environment.host):
                    self.progress.say(told)


def _metrics(suite: str, evaluation: Evaluation) -> Row:
    """The result of a suite as metrics, and that of each environment, where there are several."""
    each = {suite: evaluation, **evaluation.environments}
    return {
        prefix(of) + name: value for of, result in each.items() for name, value in result.metrics().items()
    }


def step_name(step: int) -> str:
    """What an evaluation after this step is called."""
    return f"step-{step:08d}"
