"""The ledger: one row per group and per episode, with its fate, in SQLite.

A group is issued, complete, taken, then trained; or dropped with a reason. At every moment
issued = trained + dropped + in flight. Readers (viewers, tests, a person with sqlite3) may look on while a run writes:
that is what the write-ahead log is for.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rollout.wire.segments import Location
from rollout.wire.trajectory import DropReason, EndReason, Slot, Task, Trajectory

_TABLES = """
CREATE TABLE IF NOT EXISTS groups (
    group_id INTEGER PRIMARY KEY, attempt INTEGER NOT NULL, env_id TEXT NOT NULL, env_options TEXT NOT NULL,
    seed INTEGER NOT NULL, worker TEXT NOT NULL, issue_version INTEGER NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('issued', 'complete', 'taken', 'trained', 'dropped')),
    reason TEXT, error TEXT, taken_version INTEGER, max_version INTEGER,
    segment INTEGER, "offset" INTEGER, length INTEGER);
CREATE INDEX IF NOT EXISTS groups_by_state ON groups (state);
CREATE TABLE IF NOT EXISTS episodes (
    group_id INTEGER NOT NULL, attempt INTEGER NOT NULL, episode INTEGER NOT NULL, end_reason TEXT NOT NULL,
    reward REAL NOT NULL, success INTEGER, turns INTEGER NOT NULL, tokens INTEGER NOT NULL, max_version INTEGER NOT NULL,
    error TEXT, PRIMARY KEY (group_id, attempt, episode));
"""


@dataclass(frozen=True, slots=True)
class EpisodeRow:
    """An episode as the ledger and the driver know it: outcome without payload."""

    episode: int
    end_reason: EndReason
    reward: float
    success: bool | None
    turns: int
    tokens: int  # sampled
    max_version: int  # newest weights that sampled one of them; -1 where nothing was sampled
    error: str | None

    @classmethod
    def of(cls, trajectory: Trajectory) -> EpisodeRow:
        newest = max((int(step.versions.max()) for step in trajectory.steps if len(step.versions)), default=-1)
        return cls(
            trajectory.index,
            trajectory.end_reason,
            trajectory.reward,
            trajectory.success,
            len(trajectory.steps),
            trajectory.num_sampled,
            newest,
            trajectory.error,
        )


@dataclass(frozen=True, slots=True)
class StoredGroup:
    """A group on record that a resumed run must decide about."""

    slot: Slot
    state: str
    taken_version: int | None
    max_version: int | None
    location: Location | None


class Ledger:
    """Every method is one transaction, durable when it returns."""

    def __init__(self, path: Path) -> None:
        self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self._db.execute("PRAGMA journal_mode=WAL")
        # A commit survives a crash of the process at once and of the machine after the next checkpoint of the log. What
        # matters beyond that, the payload before "complete", is synced by the segments themselves.
        self._db.execute("PRAGMA synchronous=NORMAL")
        self._db.executescript(_TABLES)

    def issue(self, slot: Slot, worker: str) -> None:
        """A worker may start this group (again, when the attempt is not the first)."""
        task = slot.task
        self._db.execute(
            "INSERT INTO groups (group_id, attempt, env_id, env_options, seed, worker, issue_version, state) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, 'issued') ON CONFLICT (group_id) DO UPDATE SET attempt = excluded.attempt, "
            "worker = excluded.worker, issue_version = excluded.issue_version, state = 'issued', taken_version = NULL, "
            'max_version = NULL, segment = NULL, "offset" = NULL, length = NULL',
            (slot.group_id, slot.attempt, task.env_id, task.options, task.seed, worker, slot.version),
        )

    def complete(self, groups: Iterable[tuple[Slot, Location, Sequence[EpisodeRow]]]) -> None:
        """The payloads of these groups are on disk."""
        with self._transaction():
            for slot, at, episodes in groups:
                self._record_episodes(slot, episodes)
                newest = max((row.max_version for row in episodes), default=-1)
                self._db.execute(
                    "UPDATE groups SET state = 'complete', max_version = ?, segment = ?, \"offset\" = ?, length = ? "
                    "WHERE group_id = ?",
                    (newest, at.segment, at.offset, at.length, slot.group_id),
                )

    def drop(self, slot: Slot, reason: DropReason, error: str, episodes: Sequence[EpisodeRow] = ()) -> None:
        """The group will never be trained."""
        with self._transaction():
            self._record_episodes(slot, episodes)
            self._db.execute(
                "UPDATE groups SET state = 'dropped', reason = ?, error = ? WHERE group_id = ?",
                (reason.value, error, slot.group_id),
            )

    def take(self, group_ids: Iterable[int], version: int) -> None:
        """The learner, standing at `version`, has these groups in its hands."""
        rows = [(version, group_id) for group_id in group_ids]
        with self._transaction():
            self._db.executemany("UPDATE groups SET state = 'taken', taken_version = ? WHERE group_id = ?", rows)

    def landed(self, version: int) -> None:
        """A checkpoint of `version` is on disk: what was taken before it is in it, and trained for good."""
        self._db.execute("UPDATE groups SET state = 'trained' WHERE state = 'taken' AND taken_version < ?", (version,))

    def counts(self) -> dict[str, int]:
        """issued (all ever given out), in_flight, and the states complete, taken, trained, dropped."""
        states = dict(self._db.execute("SELECT state, count(*) FROM groups GROUP BY state").fetchall())
        kept = {state: int(states.get(state, 0)) for state in ("complete", "taken", "trained", "dropped")}
        in_flight = int(states.get("issued", 0)) + kept["complete"] + kept["taken"]
        return {"issued": sum(states.values()), "in_flight": in_flight} | kept

    def end_reasons(self) -> dict[str, int]:
        """How many recorded episodes ended for which reason."""
        return dict(self._db.execute("SELECT end_reason, count(*) FROM episodes GROUP BY end_reason").fetchall())

    def unfinished(self) -> list[StoredGroup]:
        """Groups neither trained nor dropped, in order of group id."""
        found = self._db.execute(
            "SELECT group_id, attempt, env_id, seed, env_options, issue_version, state, taken_version, max_version, "
            "segment, \"offset\", length FROM groups WHERE state IN ('issued', 'complete', 'taken') ORDER BY group_id"
        )
        return [_stored(row) for row in found]

    def next_group_id(self) -> int:
        """One past the newest group ever issued: the cursor of the task stream."""
        (newest,) = self._db.execute("SELECT max(group_id) FROM groups").fetchone()
        return 0 if newest is None else int(newest) + 1

    def close(self) -> None:
        self._db.close()

    def _record_episodes(self, slot: Slot, episodes: Sequence[EpisodeRow]) -> None:
        self._db.executemany(
            "INSERT OR REPLACE INTO episodes VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            [
                (
                    slot.group_id,
                    slot.attempt,
                    row.episode,
                    row.end_reason.value,
                    row.reward,
                    row.success,
                    row.turns,
                    row.tokens,
                    row.max_version,
                    row.error,
                )
                for row in episodes
            ],
        )

    def _transaction(self) -> _Transaction:
        return _Transaction(self._db)


class _Transaction:
    """BEGIN ... COMMIT around a block, ROLLBACK when it raises."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    def __enter__(self) -> None:
        self._db.execute("BEGIN IMMEDIATE")

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._db.execute("COMMIT" if kind is None else "ROLLBACK")


def _stored(row: tuple[object, ...]) -> StoredGroup:
    group_id, attempt, env_id, seed, options, issue_version, state, taken, newest, segment, offset, length = row
    slot = Slot(group_id, attempt, Task(env_id, seed, options), issue_version)  # type: ignore[arg-type]
    location = None if segment is None else Location(segment, offset, length)  # type: ignore[arg-type]
    return StoredGroup(slot, state, taken, newest, location)  # type: ignore[arg-type]
