"""Reuse: groups of earlier steps that a step is trained on again, recorded in the ledger.

The choice of a step depends on the run's seed, the step's version and earlier choices only, so that a repeated step
chooses the same groups.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from rollout.buffer.samplers import Candidate
from rollout.buffer.segments import Location, ReusedGroup, segment_path
from rollout.buffer.settings import ReuseSettings
from rollout.wire.trajectory import EndReason

# version: of the step, as in groups.taken_version; discarded: that step could not train on its groups and took others.
TABLES = """
CREATE TABLE IF NOT EXISTS reuses (
    group_id INTEGER NOT NULL, version INTEGER NOT NULL, discarded INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (group_id, version)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS reuses_by_version ON reuses (version);
"""
_INDEX = "CREATE INDEX IF NOT EXISTS groups_by_step ON groups (taken_version)"
# taken_version is NULL unless a group is taken or trained; it is never below issue_version.
_CANDIDATES = """
SELECT group_id, attempt, taken_version, segment, "offset", length, checksum,
    (SELECT count(*) FROM reuses WHERE group_id = g.group_id AND version < :version AND NOT discarded) AS uses
FROM groups AS g
WHERE taken_version >= :oldest AND taken_version < :version AND issue_version >= :oldest AND uses < :limit
    AND NOT EXISTS (SELECT 1 FROM reuses WHERE group_id = g.group_id AND version <= :version AND discarded)
ORDER BY group_id
"""
_REWARDS = f"""
SELECT reward FROM episodes WHERE group_id = ? AND attempt = ? AND turns > 0
    AND end_reason NOT IN ('{EndReason.FAILED}', '{EndReason.CANCELLED}') ORDER BY episode
"""
_REUSED = """
SELECT r.version, group_id, segment, "offset", length, checksum,
    (SELECT count(*) FROM reuses WHERE group_id = r.group_id AND version <= r.version AND NOT discarded)
FROM reuses AS r JOIN groups USING (group_id) WHERE NOT r.discarded
"""
OF_STEPS = f"{_REUSED} ORDER BY r.version, group_id"
_OF_STEP = f"{_REUSED} AND r.version = ? ORDER BY group_id"
_NEEDED = """
SELECT DISTINCT segment FROM groups AS g WHERE taken_version >= :oldest AND issue_version >= :oldest
    AND (SELECT count(*) FROM reuses WHERE group_id = g.group_id AND version < :version AND NOT discarded) < :limit
"""
_FIRST_TO_LAND = "SELECT coalesce(min(taken_version), ?) FROM groups WHERE state = 'taken'"


class ReuseLog:
    """The table `reuses`, which the ledger writes within its transactions."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    def take(self, group_ids: Iterable[int], version: int) -> None:
        """Record that the learner at `version` reuses these groups."""
        rows = [(group_id, version) for group_id in group_ids]
        self._db.executemany("INSERT INTO reuses (group_id, version) VALUES (?, ?)", rows)

    def discard(self, version: int) -> None:
        """Mark the reuses of the step after `version` as discarded: it cannot train on its groups."""
        self._db.execute("UPDATE reuses SET discarded = 1 WHERE version = ?", (version,))

    def undo(self, version: int) -> None:
        """Forget the reuses of the step after `version` and of later ones, which are repeated."""
        self._db.execute("DELETE FROM reuses WHERE version >= ? AND NOT discarded", (version,))


class Reuse:
    """Choice of reused groups. db: the ledger's connection. folder: of the segments."""

    def __init__(self, settings: ReuseSettings, seed: int, db: sqlite3.Connection, folder: Path) -> None:
        self._settings = settings
        self._seed = seed
        self._db = db
        self._folder = folder
        if settings.groups:
            db.execute(_INDEX)

    def choose(self, version: int) -> list[ReusedGroup]:
        """Choose groups for the step after `version`, in order of group id; fewer if candidates are too few."""
        settings = self._settings
        if not settings.groups:
            return []
        found = self._candidates(version)
        uniform_C = np.random.default_rng((self._seed, version)).random(len(found))
        first = settings.sampler([candidate for candidate, _ in found], uniform_C)[: settings.groups]
        chosen = {candidate.group_id for candidate in first}
        return [reused for _, reused in found if reused.group_id in chosen]

    def of(self, version: int) -> list[ReusedGroup]:
        """Return the groups that the step after `version` has chosen, in order of group id."""
        if not self._settings.groups:
            return []
        rows = self._db.execute(_OF_STEP, (version,)).fetchall()
        return [ReusedGroup(group_id, nth, Location(*location)) for _, group_id, *location, nth in rows]

    def segments_in_use(self, version: int) -> set[int]:
        """Segments with groups that the step after `version`, or one repeated after a rollback, may choose."""
        settings = self._settings
        if not settings.groups:
            return set()
        (first,) = self._db.execute(_FIRST_TO_LAND, (version,)).fetchone()
        bounds = {"version": first, "oldest": first - settings.max_lag, "limit": settings.limit}
        return {int(segment) for (segment,) in self._db.execute(_NEEDED, bounds)}

    def _candidates(self, version: int) -> list[tuple[Candidate, ReusedGroup]]:
        settings = self._settings
        bounds = {"version": version, "oldest": version - settings.max_lag, "limit": settings.limit}
        rows = self._db.execute(_CANDIDATES, bounds).fetchall()
        there = {
            segment for segment in {row[3] for row in rows} if segment_path(self._folder, segment).exists()
        }
        found = []
        for group_id, attempt, taken_version, *location, uses in rows:
            if location[0] in there:
                rewards = tuple(reward for (reward,) in self._db.execute(_REWARDS, (group_id, attempt)))
                candidate = Candidate(group_id, taken_version, rewards)
                found.append((candidate, ReusedGroup(group_id, uses + 1, Location(*location))))
        return found
