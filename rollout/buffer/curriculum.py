"""Curriculum: a share of the new groups repeats the easiest task that is not yet solved, by its measured success.

    the stream's task of a group id -> for a share of the ids: a task of the same environment, played before

The choice depends on the group id, the weight version and the groups of earlier steps only. It is stored with the group
when it is issued, so that a resumed run plays the same task. With a maximum lag of 0 two equal runs choose alike.
"""

from __future__ import annotations

import math
import sqlite3
from collections import defaultdict
from collections.abc import Callable

from pydantic import BaseModel, ConfigDict, Field

from rollout.wire.trajectory import EndReason, Task

LOOKED_BACK = 4096  # newest groups whose outcomes count
# A group's outcome counts from the version after the step that was trained on it, or that it was dropped in. Episodes
# of an environment that says no success count by their reward.
_OUTCOMES = f"""
SELECT g.env_id, g.env_options, g.seed, g.group_id,
    coalesce(g.taken_version < :version, g.state = 'dropped' AND g.issue_version < :version),
    (SELECT avg(coalesce(e.success, e.reward > 0)) FROM episodes AS e
     WHERE e.group_id = g.group_id AND e.attempt = g.attempt
         AND e.end_reason NOT IN ('{EndReason.FAILED}', '{EndReason.CANCELLED}'))
FROM groups AS g WHERE g.group_id > (SELECT max(group_id) FROM groups) - {LOOKED_BACK} ORDER BY g.group_id
"""


class CurriculumSettings(BaseModel):
    """Which tasks are played again."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    repeat_share: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="fraction of the groups that repeat a task in place of the next new one: the easiest not yet "
        "solved, which is the one with the most successes in its last group among those with some and not all. 0: "
        "every group plays the next task",
    )


class Curriculum:
    """The task of a new group. task_of: the stream's task of a group id. db: the ledger's connection."""

    def __init__(
        self, settings: CurriculumSettings, task_of: Callable[[int], Task], db: sqlite3.Connection
    ) -> None:
        self._share = settings.repeat_share
        self._task_of = task_of
        self._db = db
        self._version: int | None = None  # of the candidates; None: not read yet
        self._easiest_first: dict[tuple[str, str], list[Task]] = {}

    def next(self, group_id: int, version: int) -> Task:
        """Return the stream's task of a new group, or one of the same environment and options to repeat in its place.

        version: of the engines' weights.
        """
        proposed = self._task_of(group_id)
        if not self._repeats(group_id):
            return proposed
        if self._version != version:
            self._easiest_first = self._candidates(version)
            self._version = version
        found = self._easiest_first.get((proposed.env_id, proposed.options))
        return found.pop(0) if found else proposed

    def forget(self) -> None:
        """Read the outcomes again: groups have changed their states."""
        self._version = None

    def _repeats(self, group_id: int) -> bool:
        """True for the configured share of the ids, evenly spread."""
        return math.floor((group_id + 1) * self._share) > math.floor(group_id * self._share)

    def _candidates(self, version: int) -> dict[tuple[str, str], list[Task]]:
        """Tasks to repeat by environment and options: easiest first, then those whose last group is oldest."""
        last: dict[Task, tuple[float, int]] = {}  # success of the last group whose outcome counts, and its id
        pending: set[Task] = set()
        for env_id, options, seed, group_id, counts, success in self._db.execute(
            _OUTCOMES, {"version": version}
        ):
            task = Task(env_id, seed, options)
            if not counts:
                pending.add(task)
            elif success is not None:
                last[task] = (success, group_id)
        unsolved = [task for task, (success, _) in last.items() if 0 < success < 1 and task not in pending]
        candidates = defaultdict(list)
        for task in sorted(unsolved, key=lambda task: (-last[task][0], last[task][1])):
            candidates[task.env_id, task.options].append(task)
        return candidates
