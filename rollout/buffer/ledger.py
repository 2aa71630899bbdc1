"""The ledger: one row per group and per episode, with its state, in SQLite.

    issued    a worker plays it           complete   its rows are on disk
    waiting   its worker is gone: it      taken      the learner has it
              keeps its slot and turns    trained    a checkpoint contains it
    again     it has lost its slot and    dropped    it will never be trained, for a stored reason
              is to be reissued

The first five are in flight: issued = trained + dropped + in flight, always. Other processes (viewers, tests, sqlite3)
may read while a run writes, because the ledger has a write-ahead log.

Every call is one transaction. Transactions survive a crash of the process, and of the machine too (one fsync, 2-10 ms
on a plain disk), except `issue`: it may be lost with the machine, and the group is then issued once more. `sync` makes
it durable before anything else on disk refers to it.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from rollout.buffer.ledger_checks import LedgerError, check_log, examine, naming, watch
from rollout.buffer.reuse import TABLES as _REUSES
from rollout.buffer.reuse import ReuseLog
from rollout.buffer.segments import Location
from rollout.buffer.statements import RecordingConnection
from rollout.wire.policies import Opponent
from rollout.wire.trajectory import DropReason, EndReason, Slot, Task, Trajectory

_VERSION = 3
REISSUE = "again"  # the stored name of this state; likewise the column `lane` has the worker loop, `gone` the evicted
_STATES = ("issued", "waiting", REISSUE, "complete", "taken", "trained", "dropped")
_TABLES = f"""
CREATE TABLE IF NOT EXISTS groups (
    group_id INTEGER PRIMARY KEY, attempt INTEGER NOT NULL, env_id TEXT NOT NULL, env_options TEXT NOT NULL,
    seed INTEGER NOT NULL, worker TEXT NOT NULL, lane INTEGER NOT NULL, issue_version INTEGER NOT NULL,
    policy TEXT NOT NULL, opponent TEXT, opponent_version INTEGER, state TEXT NOT NULL CHECK (state IN {_STATES}),
    reason TEXT, error TEXT, taken_version INTEGER, max_version INTEGER,
    segment INTEGER, "offset" INTEGER, length INTEGER, checksum TEXT,
    episodes INTEGER, tokens INTEGER, reward_sum REAL);
CREATE INDEX IF NOT EXISTS groups_by_state ON groups (state);
CREATE TABLE IF NOT EXISTS episodes (
    group_id INTEGER NOT NULL, attempt INTEGER NOT NULL, episode INTEGER NOT NULL, end_reason TEXT NOT NULL,
    reward REAL NOT NULL, success INTEGER, turns INTEGER NOT NULL, tokens INTEGER NOT NULL,
    max_version INTEGER NOT NULL, error TEXT, PRIMARY KEY (group_id, attempt, episode));
CREATE TABLE IF NOT EXISTS gone (worker TEXT PRIMARY KEY);
CREATE TABLE IF NOT EXISTS losses (group_id INTEGER PRIMARY KEY, workers INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value INTEGER NOT NULL);
INSERT OR IGNORE INTO meta VALUES ('buffer_version', 0), ('journal_from', 0);
{_REUSES}
"""
_ISSUE = """
INSERT INTO groups (group_id, attempt, env_id, env_options, seed, policy, opponent, opponent_version, worker, lane,
    issue_version, state)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, 'issued')
ON CONFLICT (group_id) DO UPDATE SET attempt = excluded.attempt, worker = excluded.worker, lane = excluded.lane,
    issue_version = excluded.issue_version, opponent = excluded.opponent,
    opponent_version = excluded.opponent_version, state = 'issued'
"""
_COMPLETE = """
UPDATE groups SET state = 'complete', max_version = ?, segment = ?, "offset" = ?, length = ?, checksum = ?,
    episodes = ?, tokens = ?, reward_sum = ? WHERE group_id = ?
"""
_UNTAKEN = "UPDATE groups SET state = 'complete', taken_version = NULL WHERE group_id = ?"
_WAITING = "UPDATE groups SET state = 'waiting' WHERE group_id = ?"
_LOST_WITH = "INSERT INTO losses VALUES (?, 1) ON CONFLICT (group_id) DO UPDATE SET workers = workers + 1"
_REISSUE = """
UPDATE groups SET state = 'again', taken_version = NULL, max_version = NULL, segment = NULL, "offset" = NULL,
    length = NULL, checksum = NULL, episodes = NULL, tokens = NULL, reward_sum = NULL WHERE group_id = ?
"""
_TAKEN = "UPDATE groups SET state = 'taken', taken_version = ? WHERE group_id = ?"
_TRAINED = "UPDATE groups SET state = 'trained' WHERE state = 'taken' AND taken_version < ?"
_DISCARDED = """
UPDATE groups SET state = 'dropped', reason = ?, taken_version = NULL WHERE state = 'taken' AND group_id = ?
"""
_SINCE = """
SELECT group_id, attempt, env_id, seed, env_options, issue_version, policy, opponent, opponent_version,
    state, worker, lane, taken_version, max_version, segment, "offset", length, checksum
FROM groups WHERE state IN ('issued', 'waiting', 'again', 'complete')
    OR (state IN ('taken', 'trained') AND taken_version >= ?) ORDER BY group_id
"""
_RECENT = "SELECT end_reason, error FROM episodes ORDER BY rowid DESC LIMIT ?"


@dataclass(frozen=True, slots=True)
class EpisodeRow:
    """Outcome of an episode without its payload, for ledger and driver."""

    episode: int
    end_reason: EndReason
    reward: float
    success: bool | None
    turns: int
    tokens: int  # sampled
    max_version: int  # newest weights that sampled one of them; -1: nothing was sampled
    error: str | None

    @property
    def sound(self) -> bool:
        """Whether it counts as evidence of the policy: it neither failed by infrastructure nor was cancelled."""
        return self.end_reason not in (EndReason.FAILED, EndReason.CANCELLED)

    @classmethod
    def of(cls, trajectory: Trajectory) -> EpisodeRow:
        sampled = [turn.versions for turn in trajectory.turns if len(turn.versions)]
        return cls(
            trajectory.index,
            trajectory.end_reason,
            trajectory.reward,
            trajectory.success,
            len(trajectory.turns),
            trajectory.num_sampled,
            max((int(versions.max()) for versions in sampled), default=-1),
            trajectory.error,
        )


@dataclass(frozen=True, slots=True)
class StoredGroup:
    """A group whose state may still change."""

    slot: Slot
    state: str
    worker: str  # the one that plays it, or played it last
    worker_loop: int
    taken_version: int | None
    max_version: int | None  # newest weights that sampled a token of it
    location: Location | None  # None: not complete


class Ledger:
    """Tables of one run. One writer; preconditions are checked by its `ReplayStore`.

    record: keep the statements of every transaction for a copy, which is durable instead of this file.
    """

    def __init__(self, path: Path, record: bool = False) -> None:
        check_log(path)
        connection = RecordingConnection if record else sqlite3.Connection
        # Its store is used by one thread at a time, but not always by the thread that made it.
        self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, factory=connection)
        self._durable = not record
        self._reuses = ReuseLog(self._db)
        try:
            with naming(path):
                self._open(path)
        except BaseException:
            self._db.close()
            raise
        self._unsynced = True  # whether a transaction may still be lost with the machine

    def _open(self, path: Path) -> None:
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        if version not in (0, _VERSION):
            raise LedgerError(
                f"{path}: a ledger of version {version}, but this Manta reads version {_VERSION}; use the Manta that "
                "wrote it"
            )
        if self._db.execute("SELECT 1 FROM sqlite_master WHERE name = 'meta'").fetchone():
            examine(self._db, path)
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute(f"PRAGMA synchronous={'FULL' if self._durable else 'OFF'}")
        self._db.executescript(f"BEGIN IMMEDIATE; {_TABLES} PRAGMA user_version={_VERSION};")
        watch(self._db)
        self._db.execute("COMMIT")

    @property
    def db(self) -> sqlite3.Connection:
        """The connection, for queries of `Reuse`."""
        return self._db

    @property
    def buffer_version(self) -> int:
        """Weight version of the engines, set by `release` and `rollback`."""
        return self._meta("buffer_version")

    @property
    def journal_from(self) -> int:
        """Number of the first valid journal file."""
        return self._meta("journal_from")

    def issue(self, slot: Slot, worker: str, worker_loop: int) -> None:
        """Record that a worker may start this group, or its next attempt. Durable after the next other call."""
        task, opponent = slot.task, slot.opponent
        identity = (slot.group_id, slot.attempt, task.env_id, task.options, task.seed, slot.policy)
        against = (None, None) if opponent is None else (opponent.policy, opponent.version)
        if self._durable:
            self._db.execute("PRAGMA synchronous=NORMAL")
        try:
            self._db.execute(_ISSUE, (*identity, *against, worker, worker_loop, slot.version))
        finally:
            if self._durable:
                self._db.execute("PRAGMA synchronous=FULL")
        self._unsynced = True

    def sync(self) -> None:
        """Make every `issue` so far survive a crash of the machine."""
        if self._unsynced:
            self._set("buffer_version", self.buffer_version)

    def complete(self, groups: Iterable[tuple[Slot, Location, Sequence[EpisodeRow]]]) -> None:
        """Mark groups as complete: their payloads are on disk."""
        with self._transaction():
            for slot, at, rows in groups:
                self._record_episodes(slot, rows)
                newest = max((row.max_version for row in rows), default=-1)
                location = (at.segment, at.offset, at.length, at.checksum)
                sums = (len(rows), sum(row.tokens for row in rows), sum(row.reward for row in rows))
                self._db.execute(_COMPLETE, (newest, *location, *sums, slot.group_id))

    def drop(self, slot: Slot, reason: DropReason, error: str, episodes: Sequence[EpisodeRow] = ()) -> None:
        """Mark a group as dropped: it will never be trained."""
        with self._transaction():
            self._record_episodes(slot, episodes)
            self._db.execute(
                "UPDATE groups SET state = 'dropped', reason = ?, error = ? WHERE group_id = ?",
                (reason.value, error, slot.group_id),
            )

    def reassign(self, worker: str, group_ids: Sequence[int], lost: bool = False) -> None:
        """Evict a worker and let these groups of it wait for another one. lost: it crashed or was killed."""
        rows = [(group_id,) for group_id in group_ids]
        with self._transaction():
            self._db.execute("INSERT OR IGNORE INTO gone VALUES (?)", (worker,))
            self._db.executemany(_WAITING, rows)
            self._db.executemany(_LOST_WITH, rows if lost else ())

    def losses(self) -> dict[int, int]:
        """Count by group the workers that were lost while they played it."""
        return dict(self._db.execute("SELECT group_id, workers FROM losses").fetchall())

    def evicted(self) -> set[str]:
        """Workers that were evicted since the driver started."""
        return {worker for (worker,) in self._db.execute("SELECT worker FROM gone")}

    def take(self, group_ids: Iterable[int], version: int, reused: Iterable[int] = ()) -> None:
        """Mark groups as taken by the learner at `version`, and groups of earlier steps as reused."""
        with self._transaction():
            self._db.executemany(_TAKEN, [(version, group_id) for group_id in group_ids])
            self._reuses.take(reused, version)

    def give_back(self, group_ids: Iterable[int], version: int) -> None:
        """Undo `take`: the learner at `version` has not received these groups."""
        with self._transaction():
            self._db.executemany(_UNTAKEN, [(group_id,) for group_id in group_ids])
            self._reuses.undo(version)

    def discard(self, group_ids: Iterable[int], reason: DropReason, version: int) -> None:
        """Drop groups that the learner at `version` has taken and cannot train on."""
        with self._transaction():
            self._db.executemany(_DISCARDED, [(reason.value, group_id) for group_id in group_ids])
            self._reuses.discard(version)

    def release(self, version: int) -> None:
        """Record that engines hold `version`."""
        self._set("buffer_version", version)

    def checkpointed(self, version: int) -> None:
        """A checkpoint of `version` is on disk: mark the groups that were taken before it as trained."""
        with self._transaction():
            self._db.execute(_TRAINED, (version,))

    def reissue(self, group_ids: Iterable[int], journal_from: int) -> None:
        """Mark groups to be reissued: their rows are lost."""
        with self._transaction():
            self._db.executemany(_REISSUE, [(group_id,) for group_id in group_ids])
            self._set_meta("journal_from", journal_from)

    def rollback(
        self,
        version: int,
        complete: Iterable[int],
        waiting: Iterable[int],
        reissue: Iterable[int],
        journal_from: int,
        new_driver: bool,
    ) -> None:
        """The learner continues from the checkpoint of `version`: set the states of all later groups."""
        with self._transaction():
            if new_driver:
                self._db.execute("DELETE FROM gone")
            self._db.execute(_TRAINED, (version,))
            for statement, group_ids in ((_UNTAKEN, complete), (_WAITING, waiting), (_REISSUE, reissue)):
                self._db.executemany(statement, [(group_id,) for group_id in group_ids])
            self._reuses.undo(version)
            self._set_meta("buffer_version", version)
            self._set_meta("journal_from", journal_from)

    def since(self, version: int) -> list[StoredGroup]:
        """Groups that no checkpoint up to `version` contains, in order of group id, without dropped ones."""
        return [_stored(*row) for row in self._db.execute(_SINCE, (version,))]

    def attempt_and_state(self, group_id: int) -> tuple[int, str] | None:
        """Newest attempt and state of a group."""
        found = self._db.execute(
            "SELECT attempt, state FROM groups WHERE group_id = ?", (group_id,)
        ).fetchone()
        return None if found is None else (int(found[0]), str(found[1]))

    def recent_episodes(self, count: int) -> list[tuple[EndReason, str | None]]:
        """End reason and error of the last `count` episodes, oldest first."""
        found = self._db.execute(_RECENT, (count,)).fetchall()
        return [(EndReason(reason), error) for reason, error in reversed(found)]

    def segments_in_use(self) -> set[int]:
        """Segments whose rows may still be read for training."""
        query = "SELECT DISTINCT segment FROM groups WHERE state IN ('complete', 'taken')"
        return {int(segment) for (segment,) in self._db.execute(query)}

    def counts(self) -> dict[str, int]:
        """Count groups: issued (all), in_flight, and the states complete, taken, trained and dropped."""
        states = dict(self._db.execute("SELECT state, count(*) FROM groups GROUP BY state").fetchall())
        kept = {state: int(states.get(state, 0)) for state in ("complete", "taken", "trained", "dropped")}
        issued = sum(states.values())
        return {"issued": issued, "in_flight": issued - kept["trained"] - kept["dropped"]} | kept

    def next_group_id(self) -> int:
        """One past the newest group issued: the cursor of the task stream."""
        (newest,) = self._db.execute("SELECT max(group_id) FROM groups").fetchone()
        return 0 if newest is None else int(newest) + 1

    def close(self) -> None:
        self._db.close()

    def _meta(self, name: str) -> int:
        (value,) = self._db.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
        return int(value)

    def _set(self, name: str, value: int) -> None:
        with self._transaction():
            self._set_meta(name, value)

    def _set_meta(self, name: str, value: int) -> None:
        self._db.execute("UPDATE meta SET value = ? WHERE name = ?", (value, name))

    def _record_episodes(self, slot: Slot, episodes: Sequence[EpisodeRow]) -> None:
        # The table's columns are the fields of EpisodeRow, in their order.
        rows = [(slot.group_id, slot.attempt, *astuple(row)) for row in episodes]
        self._db.executemany("INSERT INTO episodes VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", rows)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """COMMIT at the end of the block, which waits for the disk; ROLLBACK if it raises."""
        self._db.execute("BEGIN IMMEDIATE")
        recorded = self._db.recorded if isinstance(self._db, RecordingConnection) else []
        before = len(recorded)
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            del recorded[before:]
            if self._db.in_transaction:  # SQLite rolls back by itself when the disk is full
                self._db.execute("ROLLBACK")
            raise
        self._unsynced = False


def _stored(
    group_id: int,
    attempt: int,
    env_id: str,
    seed: int,
    options: str,
    issue_version: int,
    policy: str,
    *rest: Any,
) -> StoredGroup:
    other, other_version, state, worker, worker_loop, taken_version, max_version, *at = rest
    opponent = None if other is None else Opponent(other, other_version)
    slot = Slot(group_id, attempt, Task(env_id, seed, options), issue_version, policy, opponent)
    location = None if at[0] is None else Location(*at)
    return StoredGroup(slot, state, worker, worker_loop, taken_version, max_version, location)
