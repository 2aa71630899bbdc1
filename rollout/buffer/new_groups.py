"""New groups of a policy: the task of each, and who plays the other seat."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from dataclasses import dataclass

from rollout.buffer.curriculum import Curriculum, CurriculumSettings
from rollout.wire.policies import POLICY
from rollout.wire.trajectory import Slot, Task


@dataclass(frozen=True, slots=True)
class Owner:
    """The policy that a replay buffer's groups belong to."""

    policy: str = POLICY


ALONE = Owner()  # the only policy of a run


class NewGroups:
    """The slots of new groups. task_of: the stream's task of a group id. db: the ledger's connection."""

    def __init__(
        self,
        owner: Owner,
        curriculum: CurriculumSettings,
        task_of: Callable[[int], Task],
        db: sqlite3.Connection,
    ) -> None:
        self._owner = owner
        self._tasks = Curriculum(curriculum, task_of, db)

    def slot(self, group_id: int, version: int) -> Slot:
        """The first attempt of a new group. version: of the engines' weights."""
        return Slot(group_id, 0, self._tasks.next(group_id, version), version, self._owner.policy)

    def forget(self) -> None:
        """Read the outcomes of earlier groups again: they have changed their states."""
        self._tasks.forget()
