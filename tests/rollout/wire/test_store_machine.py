"""The store through any sequence of work, crashes and recoveries, beside a dictionary that says what must be so."""

from __future__ import annotations

import sqlite3
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from rollout.wire.schema import decode, encode
from rollout.wire.store import BufferSettings, EpisodeRow, Store
from rollout.wire.trajectory import DropReason, EndReason, Group, Slot, Step, Task, Trajectory

GROUPS_PER_STEP = 2


def task_of(group_id: int) -> Task:
    return Task.of("count", 1000 + group_id)


def played(slot: Slot, versions: tuple[int, int]) -> Group:
    """Two siblings of one step, sampled by these two versions."""
    siblings = []
    for index, version in enumerate(versions):
        token, logprob, by = (
            np.array([[slot.group_id, slot.attempt]]),
            np.float32([[-1, -2]]),
            [[version] * 2],
        )
        step = Step(0, 0, "?", "!", token[0], token[0], logprob[0], np.int32(by)[0], 1.0, "stop")
        siblings.append(
            Trajectory(slot.group_id, slot.attempt, index, slot.task, (step,), EndReason.TERMINATED)
        )
    return Group(slot, tuple(siblings))


@dataclass
class Fate:
    """What the model knows of one group."""

    slot: Slot
    state: str = "issued"  # or complete, taken, trained, dropped; "again": to be issued anew
    sampled_by: int = -1
    taken_at: int = -1


class StoreMachine(RuleBasedStateMachine):
    @initialize(max_lag=st.integers(0, 2))
    def open(self, max_lag: int) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.settings = BufferSettings(groups_per_step=GROUPS_PER_STEP, max_lag=max_lag)
        self.store = Store(Path(self.folder.name), task_of, self.settings)
        self.fates: dict[int, Fate] = {}
        self.version = 0  # of the learner
        self.checkpoint = 0
        self.history: list[list[int]] = []  # groups of each step that led to the learner's present weights

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.close()
            self.folder.cleanup()

    def ids(self, *states: str) -> list[int]:
        return sorted(group_id for group_id, fate in self.fates.items() if fate.state in states)

    @property
    def in_step(self) -> bool:
        return self.version > self.store.version

    @rule()
    def reserve(self) -> None:
        held = len(self.ids("issued", "complete")) + GROUPS_PER_STEP * self.in_step
        slot = self.store.reserve("w")
        assert (slot is None) == (held == (self.settings.max_lag + 1) * GROUPS_PER_STEP)
        if slot is None:
            return
        again = self.ids("again")
        expected = again[0] if again else len(self.fates)
        attempt = self.fates[expected].slot.attempt + 1 if again else 0
        assert slot == Slot(expected, attempt, task_of(expected), self.store.version)
        self.fates[expected] = Fate(slot)

    @precondition(lambda self: self.ids("issued"))
    @rule(data=st.data(), crash=st.integers(0, 9).map(lambda n: n == 0))
    def add(self, data: st.DataObject, crash: bool) -> None:
        fate = self.fates[data.draw(st.sampled_from(self.ids("issued")))]
        versions = st.integers(fate.slot.version, self.store.version)
        sampled_by = data.draw(st.tuples(versions, versions))
        group = played(fate.slot, sampled_by)
        if crash:
            self.store.append(fate.slot, encode(group))
            return self.crash()
        self.store.add(fate.slot, encode(group), [EpisodeRow.of(t) for t in group.trajectories])
        fate.state, fate.sampled_by = "complete", max(sampled_by)

    @precondition(lambda self: self.ids("issued"))
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        fate = self.fates[data.draw(st.sampled_from(self.ids("issued")))]
        self.store.drop(fate.slot, DropReason.FAILED, "no route to host")
        fate.state = "dropped"

    @rule()
    def take(self) -> None:
        batches = self.store.take()
        if batches is None:
            everything = len(self.ids("complete")) >= GROUPS_PER_STEP and not self.ids("issued")
            assert self.in_step or not everything
            return
        groups = [decode(batch) for batch in batches]
        ids = [group.slot.group_id for group in groups]
        assert ids == sorted(ids)
        assert len(ids) == GROUPS_PER_STEP
        for group in groups:
            fate = self.fates[group.slot.group_id]
            assert (group.slot, fate.state) == (fate.slot, "complete")
            assert group.trajectories[0].steps[0].action_ids.tolist() == [
                fate.slot.group_id,
                fate.slot.attempt,
            ]
            assert self.version - fate.slot.version <= self.settings.max_lag
            fate.state, fate.taken_at = "taken", self.version
        self.history.append(ids)
        self.version += 1

    @precondition(lambda self: self.in_step)
    @rule()
    def release(self) -> None:
        self.store.release(self.version)

    @rule(recorded=st.booleans())
    def save(self, recorded: bool) -> None:
        self.checkpoint = self.version
        if recorded:
            self.store.landed(self.checkpoint)
            self.contained_is_trained()

    @rule()
    def crash(self) -> None:
        self.store = Store(Path(self.folder.name), task_of, self.settings)
        self.version = self.checkpoint
        del self.history[self.version :]
        self.contained_is_trained()
        for fate in self.fates.values():
            if fate.state in ("issued", "complete", "taken", "again"):
                on_time = self.version - self.settings.max_lag <= fate.slot.version <= self.version
                known = 0 <= fate.sampled_by <= self.version
                fate.state = "complete" if on_time and known else "again"
        self.store.recover(self.version)

    def contained_is_trained(self) -> None:
        for group_id in self.ids("taken"):
            if self.fates[group_id].taken_at < self.checkpoint:
                self.fates[group_id].state = "trained"

    @precondition(lambda self: self.fates)
    @rule(data=st.data())
    def a_stale_slot_is_refused(self, data: st.DataObject) -> None:
        fate = self.fates[data.draw(st.sampled_from(sorted(self.fates)))]
        slot = fate.slot
        if fate.state == "issued":
            slot = Slot(slot.group_id, slot.attempt + 1, slot.task, slot.version)
        names_it = f"group {slot.group_id}, attempt {slot.attempt}, holds no slot"
        with pytest.raises(ValueError, match=names_it):
            self.store.add(slot, encode(played(slot, (0, 0))), [])
        with pytest.raises(ValueError, match=names_it):
            self.store.drop(slot, DropReason.FAILED)

    @invariant()
    def the_ledger_agrees(self) -> None:
        if not hasattr(self, "store"):
            return
        with sqlite3.connect(Path(self.folder.name) / "ledger.sqlite") as db:
            rows = db.execute("SELECT group_id, attempt, state, taken_version FROM groups").fetchall()
        db.close()
        assert [row[0] for row in rows] == list(range(len(self.fates)))
        for group_id, attempt, state, taken_version in rows:
            fate = self.fates[group_id]
            assert attempt == fate.slot.attempt
            assert state == ("issued" if fate.state == "again" else fate.state)
            assert (taken_version is not None) == (state in ("taken", "trained"))
        counts = self.store.counts()
        assert (
            counts["issued"] == counts["trained"] + counts["dropped"] + counts["in_flight"] == len(self.fates)
        )

    @invariant()
    def every_group_is_in_the_weights_once_or_waits(self) -> None:
        if not hasattr(self, "store"):
            return
        learned = [group_id for step in self.history for group_id in step]
        assert len(learned) == len(set(learned))
        assert sorted(learned) == self.ids("taken", "trained")


TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
