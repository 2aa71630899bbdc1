"""The statements that have changed a database, recorded so that a copy of it can repeat them."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Sequence
from typing import Any

Statement = tuple[str, list[list[Any]]]  # SQL, and the parameters of each of its executions

_CHANGES = ("INSERT", "UPDATE", "DELETE", "CREATE INDEX")


class RecordingConnection(sqlite3.Connection):
    """A connection that records every statement that changes tables; its parameters are positional.

    The statements must be functions of the tables and their parameters: no random values, no clock.
    """

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.recorded: list[Statement] = []

    def execute(self, sql: str, parameters: Any = (), /) -> sqlite3.Cursor:
        cursor = super().execute(sql, parameters)
        if _changes(sql):
            self.recorded.append((sql, [list(parameters)]))
        return cursor

    def executemany(self, sql: str, parameters: Iterable[Any], /) -> sqlite3.Cursor:
        rows = [list(row) for row in parameters]
        cursor = super().executemany(sql, rows)
        if rows and _changes(sql):
            self.recorded.append((sql, rows))
        return cursor


def encoded(statements: Sequence[Statement]) -> bytes:
    """Statements as JSON; numbers keep every bit."""
    return json.dumps(statements, ensure_ascii=False).encode()


def repeat(db: sqlite3.Connection, told: bytes) -> None:
    """Execute encoded statements in one transaction."""
    db.execute("BEGIN IMMEDIATE")
    for sql, rows in json.loads(told):
        db.executemany(sql, rows)
    db.execute("COMMIT")


def _changes(sql: str) -> bool:
    return sql.lstrip().upper().startswith(_CHANGES)
