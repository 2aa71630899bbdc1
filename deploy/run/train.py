"""The driver of a run: phases in order, numbers out. It holds no payload and knows no hosting (see runtime.py).

start -> evaluate, if asked -> stages -> version 0 to the engines -> evaluate, checkpoint -> steps, checkpoints,
evaluations -> evaluate -> report
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from typing import Any

from deploy.assembly.runtime import LearnerLost, Row, Runtime, first_failure
from deploy.config.config import RunConfig
from deploy.config.guards import GuardMonitor, with_defaults
from deploy.config.supervise import PartFailed, PartLost
from deploy.config.trackers import Trackers
from deploy.report.evaluation import BASE, summary_of
from deploy.report.metrics import MetricsLog, read_metrics, rollout_rates, stage_folder
from deploy.report.phases import Phases, Startup
from deploy.report.progress import Progress
from deploy.report.report import write_report
from deploy.report.reporter import Reporter
from deploy.run.evaluations import Evaluations, Results, step_name
from deploy.run.sessions import Sessions
from learner.training.checkpoint import newest, next_stage, versions
from learner.training.checkpoint_writing import DiskFull
from learner.training.step import not_finite
from rollout.wire.metrics import joined

STAGE_STRIDE = 10  # most steps of a stage between two looks at the display
STAGE_SECONDS = 20.0  # from one look to the next, where a step takes less
LAST_COUNT_SECONDS = 5.0  # what workers are given to say what they have sampled
DISK_SECONDS = 5.0  # from one attempt to land a checkpoint on a full disk to the next


@dataclass
class Training:
    """One run being driven through its phases."""

    config: RunConfig
    ring: Runtime
    progress: Progress
    startup: Startup = field(default_factory=Startup)
    phases: Phases = field(default_factory=Phases)
    trackers: Sequence[Any] = ()  # besides the recipe's
    _reports: Reporter = field(init=False)
    _sessions: Sessions = field(init=False)
    _trackers: Trackers = field(init=False)
    _evaluations: Evaluations = field(init=False)
    _tokens: int = 0  # generated in this session, as last heard
    _serving: bool = False  # engines are up
    _saving: bool = False  # a checkpoint may be on its way

    async def run(self, resume: bool) -> dict[str, Any]:
        """Drive the run to its end; returns the summary, which is also stored with the report."""
        folder = self.ring.run_folder
        self._reports = Reporter(folder, self.progress.say)
        self._sessions = Sessions(folder)
        self._trackers = Trackers([*self.config.trackers, *self.trackers], self.progress.say)
        self._trackers.tell("on_run_start", self.config.model_dump(mode="json"), folder)
        self._evaluations = Evaluations(
            self.config, self.ring, self.progress, self._trackers, self.startup, self.phases
        )
        self._evaluations.begin()
        try:
            with self.phases.timed("start"):
                version = await self.ring.start(resume)
            # A run stopped before its first checkpoint has nothing to go on from: it starts over in its folder.
            new = not (resume and versions(folder))  # broken ones were set aside in the start
            base = await self._base(new and newest(folder) is None)
            if new:
                await self._stages(next_stage(folder) if resume else 0)
            await self._publish(saves=new)
            before = await self._begin(new)
            await self._steps(version)
            after = await self._evaluations.play("after", self.config.steps) if self.config.steps else before
            summary = await self._summary({BASE: base, "before": before, "after": after})
        except BaseException:
            await self._end(None)
            await asyncio.to_thread(self._reports.last)
            raise
        await self._end(summary)
        self._reports.close()
        (folder / "summary.json").write_text(json.dumps(summary, indent=2), encoding="utf-8")
        write_report(folder)
        return summary

    async def _end(self, summary: dict[str, Any] | None) -> None:
        """Record what the session took, and let go of everything. summary: None of a run that was not ended."""
        self._trackers.tell("on_run_end", summary)
        self._evaluations.stop()
        try:
            await self._count_tokens()
            await self._arrival()
        finally:
            self._record()
            await self.ring.close()
            await asyncio.to_thread(self._trackers.close)

    async def _publish(self, saves: bool = False) -> None:
        """The first version for the engines, or the first after the stages."""
        with self.phases.timed("engines"), self.startup.timed("publish"):
            await self.ring.publish(saves)
        self._serving = True

    async def _base(self, untouched: bool) -> Results:
        """The evaluation before the stages, where the recipe asks for one. untouched: no stage was begun."""
        stored = self._evaluations.stored(BASE)
        if stored is not None or not (self.config.evaluation.base and untouched):
            return stored or {}
        await self._publish()
        return await self._evaluations.play(BASE, -1)

    async def _begin(self, new: bool) -> Results:
        """What comes before the first step: the first evaluation, and the checkpoint of version 0 of a new run.

        The checkpoint is written while engines play. The evaluation is stored behind it: where there is one of a run,
        there is the version that it is of.
        """
        if not new:
            stored = self._evaluations.stored("before")
            return await self._evaluations.play("before", 0) if stored is None else stored
        saving = asyncio.ensure_future(self._save_first())
        try:
            evaluating = asyncio.ensure_future(self._evaluations.play("before", 0, saving))
            results = await first_failure(evaluating, [saving])
            await saving
        finally:
            saving.cancel()
        return results

    async def _stages(self, first: int) -> None:
        """Make the stages from `first` on. A checkpoint ends each, version 0 the last: none is ever made again."""
        for index in range(first, len(self.config.stages)):
            await self._stage(index)
            await self._save(landed=True)

    async def _stage(self, index: int) -> None:
        name = f"stage {index} ({self.config.stages[index].kind})"
        with self.phases.timed("stage_data"):
            made, total = await self.ring.begin_stage(index)
        log = MetricsLog(stage_folder(self.ring.run_folder, index), resume_after=made)
        stride = 1
        with closing(log), self.phases.timed("stages"), self.progress.phase(name, total) as phase:
            phase.advance(made)
            began = time.perf_counter()
            while rows := await self.ring.advance_stage(stride):
                began, seconds = time.perf_counter(), time.perf_counter() - began
                stride = stage_stride(len(rows), seconds)
                for number, row in enumerate(rows, made + 1):
                    log.write(number, row)
                if skipped := [row for row in rows if row.get("skipped_step")]:
                    self.progress.say(
                        f"ALARM: {len(skipped)} of {len(rows)} steps of {name} were not finite and left out: "
                        f"{not_finite(skipped[-1])}"
                    )
                phase.advance(len(rows), **{key: rows[-1][key] for key in ("loss",) if key in rows[-1]})
                before, made = made, made + len(rows)
                every = self.config.checkpoint.stage_steps
                if made // every > before // every and made < total:
                    await self._save()

    async def _steps(self, version: int) -> None:
        self.progress.begin_steps(version)
        lost: LearnerLost | None = None
        with self.phases.timed("training"):
            while version < self.config.steps:
                try:
                    if lost is not None:
                        version, lost = await self.ring.recover(lost), None
                    await self._steps_from(version)
                except LearnerLost as loss:
                    lost = loss  # which may be lost again before it is back
                else:
                    version = self.config.steps

    async def _steps_from(self, version: int) -> None:
        """All steps after `version`; what was logged of them before is cut off."""
        log = MetricsLog(self.ring.run_folder, resume_after=version)
        guards = GuardMonitor(with_defaults(self.config.guards), self.progress.say)
        evaluating: asyncio.Future[Results] | None = None  # of the last step, while the next is learned
        try:
            self.startup.episodes_begin()
            self.ring.begin_rollouts()
            before = await self.ring.counters()
            if self._evaluations.missing(version):  # the run was stopped while it was under way
                evaluating = asyncio.ensure_future(self._evaluations.play(step_name(version), version))
            for step in range(version + 1, self.config.steps + 1):
                # A checkpoint is of the version that the learner stands at; the last step has one.
                row = await self.ring.step(step, evaluating, self._saves(step))
                evaluating = None
                self._require_fresh(row)
                counters = await self.ring.counters()
                row = joined(row, rollout_rates(before, counters, row["step_s"]))
                before = counters
                self._tokens = int(counters["tokens_sampled"])
                log.write(step, row)
                self._trackers.tell("on_step", {"step": float(step), **row})
                self._record()
                self.progress.update(step, row)
                guards.observe(step, row)
                if self._saves(step):
                    await self._save(landed=step == self.config.steps)
                    if step < self.config.steps:
                        self._reports.refresh()
                if self._evaluations.due(step):
                    evaluating = asyncio.ensure_future(self._evaluations.play(step_name(step), step))
        finally:
            log.close()
            if evaluating is not None:  # the learner was lost, or the run is being stopped
                evaluating.cancel()
                await asyncio.wait([evaluating])

    def _saves(self, step: int) -> bool:
        """Whether a step is followed by a checkpoint: what is compared by a metric has to be there to be kept."""
        checkpoint = self.config.checkpoint
        regular = step % checkpoint.every_steps == 0 or step == self.config.steps
        return regular or (bool(checkpoint.best_metric) and self._evaluations.due(step))

    def _require_fresh(self, row: Row) -> None:
        # The slots keep this bound; should they ever fail to, nobody is to find it out from a chart.
        buffer = self.config.buffer
        if row["lag_max"] > buffer.max_lag:
            raise RuntimeError(
                f"step {row['step']:.0f} trained a token {row['lag_max']:.0f} versions old, but "
                f"buffer.max_lag={buffer.max_lag}: an engine samples with weights nobody replaces"
            )
        if buffer.reuse.groups and row.get("reused_lag_max", 0.0) > buffer.reuse.max_lag:
            raise RuntimeError(
                f"step {row['step']:.0f} reused a token {row['reused_lag_max']:.0f} versions old, but "
                f"buffer.reuse.max_lag={buffer.reuse.max_lag}: it was sampled by weights older than its group"
            )

    async def _save_first(self) -> None:
        with self.startup.timed("checkpoint"):
            await self._save(landed=True)

    async def _count_tokens(self) -> None:
        """Ask the workers once more, for a moment: the run may be ending because they do not answer."""
        if self._serving:
            with suppress(TimeoutError):
                async with asyncio.timeout(LAST_COUNT_SECONDS):
                    counters = await self.ring.counters()
                self._tokens = int(counters.get("tokens_sampled", self._tokens))

    def _record(self) -> None:
        self._sessions.record(self.phases.seconds, self._tokens)

    async def _save(self, landed: bool = False) -> None:
        """Begin a checkpoint, which is written while the run goes on; `landed`: wait for that too.

        A full disk holds the run up until there is room.
        """
        told = ""
        while True:
            try:
                await self.ring.save()
                self._saving = True
                if landed:
                    await self.ring.landed()
                    self._saving = False
                return
            except DiskFull as error:
                if str(error) != told:
                    told = str(error)
                    self.progress.say(f"PAUSED: {told}")
                await asyncio.sleep(DISK_SECONDS)

    async def _arrival(self) -> None:
        """Let a checkpoint that is being written arrive, though the run is being stopped."""
        if self._saving:
            with suppress(LearnerLost, PartLost, PartFailed, DiskFull):
                await self.ring.landed()

    async def _summary(self, results: Mapping[str, Results]) -> dict[str, Any]:
        rows = read_metrics(self.ring.run_folder)
        await self._count_tokens()
        self._record()
        return summary_of(results) | {
            "steps": len(rows),
            **self._sessions.totals(),
            "tokens_processed": int(sum(row["tokens_processed"] for row in rows)),
            "first_episode_s": self.startup.first_episode_s and round(self.startup.first_episode_s, 2),
            "startup": {phase: round(value, 2) for phase, value in self.startup.seconds.items()},
            "ledger": await self.ring.counts(),
            "seed": self.config.seed,
        }


def stage_stride(steps: int, seconds: float) -> int:
    """How many steps of a stage to ask for at once, where so many took so long; one that takes long goes alone."""
    return max(1, min(STAGE_STRIDE, int(STAGE_SECONDS * steps / seconds)))
