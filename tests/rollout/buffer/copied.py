"""Stores whose state has a copy, as tests open, abandon and compare them."""

from __future__ import annotations

import sqlite3
import tempfile
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from rollout.buffer.ledger_checks import LEDGER
from rollout.buffer.objects import FolderObjects, Objects
from rollout.buffer.part_log import read
from rollout.buffer.replay_store import BufferSettings, ReplayStore
from rollout.buffer.state_copy import restore
from rollout.buffer.state_place import state_of
from tests.rollout.buffer.store_model import task_of

TABLES = ("groups", "episodes", "reuses", "gone", "losses", "meta")


class Copied:
    """A store with its state in `local`, a copy at `base` (the run folder, unless said otherwise)."""

    def __init__(
        self, run: Path, local: Path, settings: BufferSettings, base: str = "", seed: int = 7
    ) -> None:
        run.mkdir(parents=True, exist_ok=True)
        self._stack = ExitStack()
        with ExitStack() as stack:
            self.state, copy = stack.enter_context(state_of(run, base or str(run), local))
            self.store = ReplayStore(self.state, task_of, settings, seed=seed, copy=copy, run_folder=run)
            self._stack = stack.pop_all()

    def abandon(self) -> None:
        """As if the process had been killed and its disk lost: nothing more reaches the copy."""
        self.store._copy = None
        self.store.close()
        self._stack.close()

    def close(self) -> None:
        self.store.close()
        self._stack.close()


def tables(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Every row of a ledger, by column."""
    with closing(sqlite3.connect(folder / LEDGER)) as db:
        db.row_factory = sqlite3.Row
        rows = {table: db.execute(f"SELECT * FROM {table}").fetchall() for table in TABLES}
        return {table: sorted(map(dict, found), key=repr) for table, found in rows.items()}


def files(folder: Path) -> dict[str, bytes]:
    """Journal and segments, byte for byte."""
    found = [*(folder / "turns").glob("*.journal"), *(folder / "groups").glob("*.arrows")]
    return {path.name: path.read_bytes() for path in found}


def copied(base: Path | Objects) -> tuple[dict[str, list[dict[str, Any]]], dict[str, bytes]]:
    """What the copy alone has: the rows of the ledger, and all files, whole segments among them."""
    objects = FolderObjects(base) if isinstance(base, Path) else base
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        restore(read(objects), folder)
        whole = {each: objects.get(f"groups/{each}") for each in objects.names("groups")}
        parts = files(folder)
        assert all(whole.get(each, data) == data for each, data in parts.items())
        return tables(folder), whole | parts
