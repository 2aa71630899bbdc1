"""The learner of a run in this process: what a local run and a replay have alike."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

from deploy.assembly.models import build_learner, model_path, teacher_path
from deploy.assembly.runtime import LearnerLost, Row
from deploy.assembly.stage_data import stage_data
from deploy.config.config import RunConfig
from learner.training.checkpoint import newest
from learner.training.loop import LearnerLoop, Place, Published, Source


class LearnerHere:
    """The learner's half of a `Runtime`."""

    _learner: LearnerLoop

    def __init__(self, config: RunConfig, run_folder: Path) -> None:
        self.run_folder = run_folder
        self._config = config

    @cached_property
    def path(self) -> str:
        """The folder of the base model, made and compared with its checksums once."""
        return model_path(self._config, self.run_folder)

    def start_learner(
        self, source: Source, place: Place, resume: bool, published: Published | None = None
    ) -> int:
        """Build the learner, from the run's newest checkpoint where it goes on with one; returns its version."""
        config, folder = self._config, self.run_folder
        learner = build_learner(config, self.path, teacher=teacher_path(config, folder))
        # A run stopped before its first checkpoint has none to load: it starts over in its folder.
        if resume and newest(folder) is not None:
            learner.load(folder)
        learner.keep_advantages(folder)
        seconds, keep = config.cluster.step_timeout_seconds, config.checkpoint.keep
        self._learner = LearnerLoop(
            learner,
            source,
            place,
            config.engine.dtype,
            seconds,
            keep,
            policy=config.policy,
            published=published,
        )
        return learner.version

    async def begin_stage(self, index: int) -> tuple[int, int]:
        return await self._learner.begin_stage(index, await stage_data(self._config, index, self.path))

    async def advance_stage(self, steps: int) -> list[Row]:
        return await self._learner.advance_stage(steps)

    async def recover(self, loss: LearnerLost) -> int:
        raise loss  # one process: what loses the learner loses everything

    async def save(self) -> None:
        await self._learner.save(self.run_folder)

    async def landed(self) -> None:
        await self._learner.landed()
