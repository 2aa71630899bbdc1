"""The ledger: one row per group and per episode, with its fate, in SQLite.

A group is issued, complete, taken, then trained; or dropped with a reason. At every moment
issued = trained + dropped + in flight. Readers (viewers, tests, a person with sqlite3) may look on while a run writes:
that is what the write-ahead log is for.

Every call is one transaction. All of them survive the death of the process; `take` and `landed` also survive that of
the machine before they return (one fsync, 2-10 ms on a plain disk). The others may lose their last moments with the
machine, which costs work but no truth: a group whose "issued", "complete" or "dropped" is lost is issued again. Only a
lost "taken" could have a group trained twice, and its fsync carries everything written before it.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rollout.wire.segments import Location
from rollout.wire.trajectory import DropReason, EndReason, Slot, Task, Trajectory

_VERSION = 1
_TABLES = """
CREATE TABLE IF NOT EXISTS groups (
    group_id INTEGER PRIMARY KEY, attempt INTEGER NOT NULL, env_id TEXT NOT NULL, env_options TEXT NOT NULL,
    seed INTEGER NOT NULL, worker TEXT NOT NULL, issue_version INTEGER NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('issued', 'complete', 'taken', 'trained', 'dropped')),
    reason TEXT, error TEXT, taken_version INTEGER, max_version INTEGER,
    segment INTEGER, "offset" INTEGER, length INTEGER, episodes INTEGER, tokens INTEGER, reward_sum REAL);
CREATE INDEX IF NOT EXISTS groups_by_state ON groups (state);
CREATE TABLE IF NOT EXISTS episodes (
    group_id INTEGER NOT NULL, attempt INTEGER NOT NULL, episode INTEGER NOT NULL, end_reason TEXT NOT NULL,
    reward REAL NOT NULL, success INTEGER, turns INTEGER NOT NULL, tokens INTEGER NOT NULL,
    max_version INTEGER NOT NULL, error TEXT, PRIMARY KEY (group_id, attempt, episode));
"""
_ISSUE = """
INSERT INTO groups (group_id, attempt, env_id, env_options, seed, worker, issue_version, state)
VALUES (?, ?, ?, ?, ?, ?, ?, 'issued')
ON CONFLICT (group_id) DO UPDATE SET
    attempt = excluded.attempt, worker = excluded.worker, issue_version = excluded.issue_version
"""
_COMPLETE = """
UPDATE groups SET state = 'complete', max_version = ?, segment = ?, "offset" = ?, length = ?,
    episodes = ?, tokens = ?, reward_sum = ? WHERE group_id = ?
"""
_COMPLETE_AGAIN = "UPDATE groups SET state = 'complete', taken_version = NULL WHERE group_id = ?"
_LOST = """
UPDATE groups SET state = 'issued', taken_version = NULL, max_version = NULL, segment = NULL, "offset" = NULL,
    length = NULL, episodes = NULL, tokens = NULL, reward_sum = NULL WHERE group_id = ?
"""
_UNFINISHED = """
SELECT group_id, attempt, env_id, seed, env_options, issue_version, max_version, segment, "offset", length
FROM groups WHERE state IN ('issued', 'complete', 'taken') ORDER BY group_id
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
        sampled = [step.versions for step in trajectory.steps if len(step.versions)]
        return cls(
            trajectory.index,
            trajectory.end_reason,
            trajectory.reward,
            trajectory.success,
            len(trajectory.steps),
            trajectory.num_sampled,
            max((int(versions.max()) for versions in sampled), default=-1),
            trajectory.error,
        )


@dataclass(frozen=True, slots=True)
class StoredGroup:
    """A group on record that a resumed run must decide about."""

    slot: Slot
    max_version: int | None
    location: Location | None  # None: never completed


class Ledger:
    """The tables of one run. One writer; it checks nothing that its `Store` has checked."""

    def __init__(self, path: Path) -> None:
        self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        if version not in (0, _VERSION):
            raise ValueError(
                f"{path}: a ledger of version {version}, but this Manta reads version {_VERSION}"
            )
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=NORMAL")
        self._db.executescript(_TABLES)
        self._db.execute(f"PRAGMA user_version={_VERSION}")

    def issue(self, slot: Slot, worker: str) -> None:
        """A worker may start this group; for another attempt, `recover` has cleared its row."""
        task = slot.task
        self._db.execute(
            _ISSUE, (slot.group_id, slot.attempt, task.env_id, task.options, task.seed, worker, slot.version)
        )

    def complete(self, groups: Iterable[tuple[Slot, Location, Sequence[EpisodeRow]]]) -> None:
        """The payloads of these groups are on disk."""
        with self._transaction():
            for slot, at, rows in groups:
                self._record_episodes(slot, rows)
                newest = max((row.max_version for row in rows), default=-1)
                sums = (len(rows), sum(row.tokens for row in rows), sum(row.reward for row in rows))
                self._db.execute(_COMPLETE, (newest, at.segment, at.offset, at.length, *sums, slot.group_id))

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
        taken = "UPDATE groups SET state = 'taken', taken_version = ? WHERE group_id = ?"
        with self._transaction(durable=True):
            self._db.executemany(taken, [(version, group_id) for group_id in group_ids])

    def landed(self, version: int) -> None:
        """A checkpoint of `version` is on disk: what was taken before it is in it, and trained for good."""
        trained = "UPDATE groups SET state = 'trained' WHERE state = 'taken' AND taken_version < ?"
        with self._transaction(durable=True):
            self._db.execute(trained, (version,))

    def recover(self, complete: Iterable[int], lost: Iterable[int]) -> None:
        """After a crash: the first are complete (again), the others wait for their next attempt."""
        with self._transaction():
            self._db.executemany(_COMPLETE_AGAIN, [(group_id,) for group_id in complete])
            self._db.executemany(_LOST, [(group_id,) for group_id in lost])

    def counts(self) -> dict[str, int]:
        """issued (all ever given out), in_flight, and the states complete, taken, trained, dropped."""
        states = dict(self._db.execute("SELECT state, count(*) FROM groups GROUP BY state").fetchall())
        kept = {state: int(states.get(state, 0)) for state in ("complete", "taken", "trained", "dropped")}
        in_flight = int(states.get("issued", 0)) + kept["complete"] + kept["taken"]
        return {"issued": sum(states.values()), "in_flight": in_flight} | kept

    def unfinished(self) -> list[StoredGroup]:
        """Groups neither trained nor dropped, in order of group id."""
        return [_stored(*row) for row in self._db.execute(_UNFINISHED)]

    def next_group_id(self) -> int:
        """One past the newest group ever issued: the cursor of the task stream."""
        (newest,) = self._db.execute("SELECT max(group_id) FROM groups").fetchone()
        return 0 if newest is None else int(newest) + 1

    def close(self) -> None:
        self._db.close()

    def _record_episodes(self, slot: Slot, episodes: Sequence[EpisodeRow]) -> None:
        rows = [
            (
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
        ]
        self._db.executemany(
            "INSERT INTO episodes VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            [(slot.group_id, slot.attempt, *row) for row in rows],
        )

    @contextmanager
    def _transaction(self, durable: bool = False) -> Iterator[None]:
        """COMMIT at the end of the block, ROLLBACK when it raises; `durable` waits for the disk."""
        if durable:
            self._db.execute("PRAGMA synchronous=FULL")
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        finally:
            self._db.execute("PRAGMA synchronous=NORMAL")


def _stored(
    group_id: int,
    attempt: int,
    env_id: str,
    seed: int,
    options: str,
    issue_version: int,
    newest: int | None,
    *at: Any,
) -> StoredGroup:
    slot = Slot(group_id, attempt, Task(env_id, seed, options), issue_version)
    return StoredGroup(slot, newest, None if at[0] is None else Location(*at))
