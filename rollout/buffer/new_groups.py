"""New groups of a policy: the task of each, and who plays the other seat."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from dataclasses import dataclass, replace

from rollout.buffer.curriculum import Curriculum, CurriculumSettings
from rollout.buffer.league import LeagueSettings, Matchmaking
from rollout.wire.policies import POLICY
from rollout.wire.trajectory import Slot, Task


@dataclass(frozen=True, slots=True)
class Owner:
    """The policy that a replay buffer's groups belong to, and the policies of the run that it meets in games."""

    policy: str = POLICY
    league: LeagueSettings | None = None  # None: nobody of the run plays the other seat
    opponents: tuple[str, ...] = ()


ALONE = Owner()  # the only policy of a run


class NewGroups:
    """The slots of new groups. task_of: the stream's task of a group id. seed: of the run. db: of the ledger."""

    def __init__(
        self,
        owner: Owner,
        curriculum: CurriculumSettings,
        task_of: Callable[[int], Task],
        seed: int,
        db: sqlite3.Connection,
    ) -> None:
        self._policy = owner.policy
        self._tasks = Curriculum(curriculum, task_of, db)
        self._matches: Matchmaking | None = None
        if owner.league is not None:
            self._matches = Matchmaking(owner.league, owner.opponents, seed, db)

    def slot(self, group_id: int, version: int) -> Slot:
        """The first attempt of a new group. version: of the engines' weights."""
        opponent = None if self._matches is None else self._matches.opponent(group_id, version)
        return Slot(group_id, 0, self._tasks.next(group_id, version), version, self._policy, opponent)

    def again(self, slot: Slot) -> Slot:
        """A group that is reissued; it meets another opponent where its own is a version that is to be made again."""
        if self._matches is None or slot.opponent is None or slot.opponent.version <= slot.version:
            return slot
        return replace(slot, opponent=self._matches.opponent(slot.group_id, slot.version))

    def forget(self) -> None:
        """Read the outcomes of earlier groups again: they have changed their states."""
        self._tasks.forget()
        if self._matches:
            self._matches.forget()
