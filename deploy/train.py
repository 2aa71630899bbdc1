"""The driver of a run: phases in order, numbers out. It holds no payload and knows no hosting (see ring.py).

start -> warm start -> version 0 to the engines -> evaluate -> steps, checkpoints -> evaluate -> report
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deploy.build import evaluation_tasks, held_out, told_alike
from deploy.config import RunConfig
from deploy.evaluation import Evaluation, figures
from deploy.guards import Watch, with_defaults
from deploy.metrics import MetricsLog, read_metrics, rollout_rates
from deploy.progress import Progress
from deploy.report import write_report
from deploy.reporter import Reporter
from deploy.ring import LearnerLost, Ring, Row
from learner.checkpoint import DiskFull
from rollout.wire.metrics import joined

IMITATION_STRIDE = 10  # imitation steps between two looks at the display
DISK_SECONDS = 5.0  # from one attempt to land a checkpoint on a full disk to the next


@dataclass
class Training:
    """One run being driven through its phases."""

    config: RunConfig
    ring: Ring
    progress: Progress
    seconds: dict[str, float] = field(default_factory=dict)
    _reports: Reporter = field(init=False)

    async def run(self, resume: bool) -> dict[str, Any]:
        """Drive the run to its end; returns the summary, which is also stored with the report."""
        folder = self.ring.run_folder
        self._reports = Reporter(folder, self.progress.say)
        try:
            with self._timed("start"):
                version = await self.ring.start(resume)
            # A run stopped before its first checkpoint has nothing to go on from: it starts over in its folder.
            if not (resume and _has_checkpoint(folder)):
                if self.config.warm_start:
                    await self._warm_start()
                await self._save()
            with self._timed("engines"):
                await self.ring.publish()
            before = self._stored_evaluation(folder) or await self._evaluate("before")
            await self._steps(version)
            after = await self._evaluate("after")
            summary = await self._summary(before, after)
        except BaseException:
            await self.ring.close()
            await asyncio.to_thread(self._reports.last)
            raise
        await self.ring.close()
        self._reports.close()
        (folder / "summary.json").write_text(json.dumps(summary, indent=2))
        write_report(folder)
        return summary

    async def _warm_start(self) -> None:
        with self._timed("demonstrations"):
            total = await self.ring.begin_imitation()
        with self._timed("warm_start"), self.progress.phase("imitation", total) as phase:
            while rows := await self.ring.imitate(IMITATION_STRIDE):
                if skipped := [row for row in rows if row.get("skipped_step")]:
                    self.progress.say(
                        f"ALARM: {len(skipped)} of {len(rows)} imitation steps were not finite and left out "
                        f"(loss {skipped[-1]['loss']:g}, gradient norm {skipped[-1]['grad_norm']:g})"
                    )
                phase.advance(len(rows), loss=rows[-1]["loss"])

    async def _evaluate(self, name: str) -> Evaluation | None:
        if not self.config.evaluation.tasks or self.config.replay:
            return None
        tasks = await asyncio.to_thread(evaluation_tasks, self.config)
        if name == "before" and (told := await asyncio.to_thread(told_alike, tasks, self.config.env.host)):
            self.progress.say(told)
        with self._timed(f"evaluate_{name}"):
            evaluation = Evaluation.of(await self.ring.evaluate(tasks, name), held_out(self.config))
        self.progress.say(f"{name}: {evaluation}")
        evaluation.save(self.ring.run_folder / f"evaluation_{name}.json")
        return evaluation

    def _stored_evaluation(self, folder: Path) -> Evaluation | None:
        stored = folder / "evaluation_before.json"
        return Evaluation.load(stored) if stored.is_file() else None

    async def _steps(self, version: int) -> None:
        self.progress.begin_steps(version)
        lost: LearnerLost | None = None
        with self._timed("training"):
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
        guards = Watch(with_defaults(self.config.guards), self.progress.say)
        try:
            self.ring.begin_rollouts()
            before = await self.ring.counters()
            for step in range(version + 1, self.config.steps + 1):
                row = await self.ring.step(step)
                self._require_fresh(row)
                counters = await self.ring.counters()
                row = joined(row, rollout_rates(before, counters, row["step_s"]))
                before = counters
                log.write(step, row)
                self.progress.update(step, row)
                guards.look(step, row)
                if step % self.config.checkpoint.every_steps == 0 or step == self.config.steps:
                    await self._save()
                    if step < self.config.steps:
                        self._reports.refresh()
        finally:
            log.close()

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

    async def _save(self) -> None:
        """Land a checkpoint; a full disk holds the run up until there is room."""
        told = ""
        while True:
            try:
                return await self.ring.save()
            except DiskFull as error:
                if str(error) != told:
                    told = str(error)
                    self.progress.say(f"PAUSED: {told}")
                await asyncio.sleep(DISK_SECONDS)

    async def _summary(self, before: Evaluation | None, after: Evaluation | None) -> dict[str, Any]:
        rows = read_metrics(self.ring.run_folder)
        return figures(before, after) | {
            "steps": len(rows),
            "seconds": {phase: round(value, 2) for phase, value in self.seconds.items()},
            "tokens_generated": int((await self.ring.counters())["tokens_sampled"]),
            "tokens_processed": int(sum(row["tokens_processed"] for row in rows)),
            "ledger": await self.ring.counts(),
            "seed": self.config.seed,
        }

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - began


def _has_checkpoint(folder: Path) -> bool:
    from learner.checkpoint import latest

    return latest(folder) is not None
