"""The machine of test_replay_store_machine.py with a copy: every death takes the disk with it, and the copy has it all.

A process dies in any sync of a part, before the part has its name or after, or in a call of the ledger's own disk.
"""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from rollout.buffer import state_copy
from rollout.buffer.replay_store import ReplayStore
from tests.rollout.buffer.copied import Copied, copied, files, tables
from tests.rollout.buffer.store_model import T
from tests.rollout.buffer.test_replay_store_machine import StoreMachine

SNAPSHOT_PARTS = 7  # a few calls: snapshots and removals happen in between


class CopiedStoreMachine(StoreMachine):
    def opened(self) -> ReplayStore:
        if not hasattr(self, "snapshots"):
            self.snapshots = patch.object(state_copy, "SNAPSHOT_PARTS", SNAPSHOT_PARTS)
            self.snapshots.start()
        self.copied = Copied(self.folder / "run", self.folder / "local", self.settings)
        return self.copied.store

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.patch.stop()
            self.snapshots.stop()
            rows, stored = tables(self.run_folder), files(self.run_folder)
            self.copied.close()
            # The run folder is what readers find: the ledger without its log, every segment whole.
            assert tables(self.folder / "run") == rows
            run = files(self.folder / "run")
            assert all(
                run[name].startswith(data) for name, data in stored.items() if name.endswith(".arrows")
            )
            shutil.rmtree(self.folder)

    @property
    def run_folder(self) -> Path:
        return self.copied.state

    def note_what_is_durable(self) -> None:
        if not self.copied.store._copy._recorded:  # type: ignore[union-attr]
            self.issues.clear()

    def die(self, data: st.DataObject) -> None:
        self.note_what_is_durable()
        self.copied.abandon()
        self.lives += 1
        self.store = self.opened()
        with sqlite3.connect(self.run_folder / "ledger.sqlite") as db:
            known = dict(db.execute("SELECT group_id, attempt FROM groups").fetchall())
        db.close()
        self.forget_lost_issues(known)

    def call(self, data: st.DataObject, call: Callable[[], T]) -> T:
        def shipped() -> T:
            answer = call()
            self.store.ship()
            return answer

        return super().call(data, shipped)

    @precondition(lambda self: not self.copied.store._copy._recorded)
    @rule()
    def the_copy_equals_the_state(self) -> None:
        """The copy, read by itself, has the ledger's rows and the files' bytes, and no more."""
        rows, stored = copied(self.folder / "run")
        assert rows == tables(self.run_folder)
        own = files(self.run_folder)
        assert {name: stored[name] for name in own} == own
        assert all(
            name.endswith(".arrows") for name in stored.keys() - own.keys()
        )  # whole and not needed here


TestCopiedStoreMachine = CopiedStoreMachine.TestCase
TestCopiedStoreMachine.settings = settings(max_examples=6, stateful_step_count=40)


@pytest.mark.rare
class TestCopiedStoreMachineAtLength(TestCopiedStoreMachine):  # type: ignore[misc, valid-type]
    settings = settings(max_examples=40, stateful_step_count=40)
