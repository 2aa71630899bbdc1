"""A stage of a user's own: its object, whose errors and wrong results are one line for its author."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from learner.parallel.ranks import RankLost
from learner.stages.settings import OwnStage
from learner.stages.stage import StageLearner
from rollout.wire.metrics import Row
from rollout.wire.own_part import OwnPartRefused
from rollout.wire.trajectory import Group


class Owned:
    """A `Stage` around the object that the user's class makes."""

    def __init__(self, part: OwnStage) -> None:
        self._part = part
        self._made = part.call()

    def begin(self, learner: StageLearner, groups: Sequence[Group]) -> int:
        steps = self._part.guarded(self._made.begin, learner, groups, passed=(RankLost,))
        if not isinstance(steps, int) or steps < 0:
            raise OwnPartRefused(
                f"{self._part.kind}: begin must return the number of steps, not {steps!r:.60}"
            )
        return steps

    def advance(self, step: int) -> Row:
        row = self._part.guarded(self._made.advance, step, passed=(RankLost,))
        if not isinstance(row, Mapping) or not all(isinstance(value, int | float) for value in row.values()):
            raise OwnPartRefused(f"{self._part.kind}: advance must return a dict of numbers, not {row!r:.60}")
        return {str(name): float(value) for name, value in row.items()}
