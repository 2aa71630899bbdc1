"""Integrity of a ledger: SQLite has no checksums of its pages, and silently discards a damaged log.

the write-ahead log   its frames have chained checksums, and SQLite takes the first frame that does not match for the
                      log's end. A matching frame behind it shows that the log is damaged rather than cut by a crash.
the tables            a digest of all rows, updated within every transaction by temporary triggers, and one of the
                      tables' definitions. Opening the ledger computes both again.
the run               a learner's checkpoint implies how many groups each of its steps has.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3

LEDGER = "ledger.sqlite"  # its name in a run folder
_DIGEST, _SCHEMA = "digest", "schema"  # in the table meta
_MASK = 2**61 - 1  # sums of two digests stay within SQLite's integers
_HEADER, _FRAME = 32, 24  # bytes of the log's header and of a frame's, before its page
_WORDS = {
    0x377F0682: "<u4",
    0x377F0683: ">u4",
}  # by the log's first number: how its checksums read their words
_PER_VERSION = """
SELECT taken_version, count(*) FROM groups WHERE state IN ('taken', 'trained') AND taken_version < ?
GROUP BY taken_version
"""


class LedgerError(ValueError):
    """A ledger that cannot be used; the message, one line, names the file and the remedy."""


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turn SQLite's errors for a damaged or unreadable file into a LedgerError that names the file."""
    try:
        yield
    except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF
        if code in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM):
            raise LedgerError(
                f"{path}: cannot be opened ({error}); give this user write access to its folder"
            ) from error
        if isinstance(error, sqlite3.OperationalError) and code != sqlite3.SQLITE_ERROR:
            raise  # a full or failing disk, or a lock of another process
        raise _damaged(path, str(error)) from error


def check_log(path: Path) -> None:
    """Raise LedgerError if the write-ahead log is damaged. Call it before the ledger is opened.

    A log that a crash has cut off passes: committed transactions are before the cut.
    """
    log = path.with_name(f"{path.name}-wal")
    data = log.read_bytes() if log.is_file() else b""
    if len(data) < _HEADER + _FRAME:
        return
    header = np.frombuffer(data, ">u4", count=8).tolist()
    words = _WORDS.get(header[0])
    if words is None or _checksum(data[:24], words, (0, 0)) != tuple(header[6:]):
        raise _damaged(log, "its header does not match its checksum")
    salts, size = header[4:6], _FRAME + header[2]
    before, failed = (header[6], header[7]), None  # failed: what the frame before should have been
    for offset in range(_HEADER, len(data) - size + 1, size):
        frame = np.frombuffer(data, ">u4", count=6, offset=offset).tolist()
        checked = data[offset : offset + 8] + data[offset + _FRAME : offset + size]
        stored, own = (frame[4], frame[5]), frame[2:4] == salts
        fits = own and any(
            _checksum(checked, words, begin) == stored for begin in ([before] if failed is None else failed)
        )
        if failed is not None:
            if fits:
                raise _damaged(log, f"the frame at byte {offset - size} does not match its checksum")
            return
        if not fits:
            failed = [stored, _checksum(checked, words, before)]
        before = stored


def examine(db: sqlite3.Connection, path: Path) -> None:
    """Compare an open ledger with its digests; one without digests passes. Raises LedgerError."""
    with naming(path):
        (sound,) = db.execute("PRAGMA integrity_check(1)").fetchone()
        if sound != "ok":
            raise _damaged(path, str(sound))
        kept = dict(db.execute("SELECT name, value FROM meta").fetchall())
        digests = kept.keys() - {"buffer_version", "journal_from"}
        if digests not in (set(), {_DIGEST, _SCHEMA}):
            raise _damaged(path, "its table meta was changed")
        if digests and (_digest(db) != kept[_DIGEST] or _schema(db) != kept[_SCHEMA]):
            raise _damaged(path, "its rows do not match their checksum")


def watch(db: sqlite3.Connection) -> None:
    """Keep the digests of an examined ledger up to date, by triggers; a ledger without digests gets them."""
    db.create_function("row_digest", -1, _row_digest, deterministic=True)
    if not db.execute("SELECT 1 FROM meta WHERE name = ?", (_DIGEST,)).fetchone():
        db.execute("INSERT INTO meta VALUES (?, ?)", (_DIGEST, _digest(db)))
    db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (_SCHEMA, _schema(db)))
    for table in _tables(db):
        _keep_digest(db, table)


def check_ledger(path: Path, version: int, groups_per_step: int) -> None:
    """Raise LedgerError if a stopped run's ledger is damaged, or lacks groups that a checkpoint of `version` contains.

    Nothing is written.
    """
    check_log(path)
    with naming(path), closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as db:
        examine(db, path)
        trained = dict(db.execute(_PER_VERSION, (version,)).fetchall())
    for step in range(version):
        if (there := trained.get(step, 0)) != groups_per_step:
            raise _damaged(
                path,
                f"it has {there} of {groups_per_step} groups of step {step + 1}, which the checkpoint of version "
                f"{version} contains",
            )


def _keep_digest(db: sqlite3.Connection, table: str) -> None:
    names = [row[1] for row in db.execute(f"PRAGMA table_info({table})")]
    new, old = (", ".join(f'{when}."{name}"' for name in names) for when in ("NEW", "OLD"))
    changes = {"INSERT": f"+ row_digest('{table}', {new})", "DELETE": f"- row_digest('{table}', {old})"}
    changes["UPDATE"] = f"{changes['INSERT']} {changes['DELETE']}"
    for event, change in changes.items():
        # The digests are not part of the digest.
        row = "OLD" if event == "DELETE" else "NEW"
        unless = f"WHEN {row}.name NOT IN ('{_DIGEST}', '{_SCHEMA}')" if table == "meta" else ""
        db.execute(
            f"CREATE TEMP TRIGGER digest_{table}_{event} AFTER {event} ON {table} {unless} BEGIN "
            f"UPDATE meta SET value = (value {change}) & {_MASK} WHERE name = '{_DIGEST}'; END"
        )


def _digest(db: sqlite3.Connection) -> int:
    own = {"meta": f"WHERE name NOT IN ('{_DIGEST}', '{_SCHEMA}')"}
    rows = (
        (table, *row)
        for table in _tables(db)
        for row in db.execute(f"SELECT * FROM {table} {own.get(table, '')}")
    )
    return sum(_row_digest(*row) for row in rows) & _MASK


def _schema(db: sqlite3.Connection) -> int:
    return _row_digest(
        *db.execute("SELECT name, sql FROM main.sqlite_master WHERE type = 'table'").fetchall()
    )


def _tables(db: sqlite3.Connection) -> list[str]:
    found = db.execute("SELECT name FROM main.sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite%'")
    return [name for (name,) in found]


def _row_digest(*values: Any) -> int:
    # SQLite returns a whole number of a REAL column as int or float.
    plain = [int(each) if isinstance(each, float) and each.is_integer() else each for each in values]
    return int.from_bytes(blake3(repr(plain).encode()).digest(length=8)) & _MASK


def _checksum(data: bytes, words: str, begin: tuple[int, int]) -> tuple[int, int]:
    """SQLite's running checksum of a log: https://www.sqlite.org/fileformat2.html#checksum_algorithm."""
    first, second = begin
    numbers = iter(np.frombuffer(data, words).tolist())
    for one, other in zip(numbers, numbers, strict=True):
        first = (first + one + second) & 0xFFFFFFFF
        second = (second + other + first) & 0xFFFFFFFF
    return first, second


def _damaged(path: Path, why: str) -> LedgerError:
    why = " ".join(why.split())[:200]  # SQLite repeats the definition that it cannot read
    return LedgerError(
        f"{path}: damaged ({why}); restore ledger.sqlite, with the -wal beside it, from a copy, or start a new run"
    )
