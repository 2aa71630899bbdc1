"""The store through any sequence of work, lost answers, deaths and rollbacks, beside a dictionary of what must be so.

A death is what the disk has at that instant, opened again: files that nobody closed, less any part of what was not
synced. It comes between two calls, or within one; a call that did not return is repeated.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import tempfile
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from unittest.mock import patch

import pyarrow as pa
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from rollout.buffer.replay_store import BufferSettings, EpisodeRow, ReplayStore
from rollout.buffer.samplers import AnySampler
from rollout.buffer.settings import ReuseSettings
from rollout.wire.schema import decode, encode, restore_turns
from rollout.wire.trajectory import Assignment, DropReason, StaleSlot
from tests.rollout.buffer.reuse_model import SAMPLERS, ReuseModel
from tests.rollout.buffer.store_model import (
    GROUPS_PER_STEP,
    WORKERS,
    Died,
    Disk,
    Fate,
    T,
    ids,
    next_slot,
    played,
    some_turns,
    stale_slot,
    task_of,
)


class StoreMachine(RuleBasedStateMachine):
    @initialize(
        max_lag=st.integers(0, 2),
        reused=st.integers(0, 2),
        limit=st.integers(1, 2),
        longer=st.integers(1, 3),
        sampler=st.sampled_from(SAMPLERS),
    )
    def open(self, max_lag: int, reused: int, limit: int, longer: int, sampler: AnySampler) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.disk = Disk()
        self.patch = patch.object(os, "fsync", self.disk.fsync)
        self.patch.start()
        reuse = ReuseSettings(groups=reused, limit=limit, max_lag=max_lag + longer, sampler=sampler)
        self.reuse = ReuseModel(reuse)
        self.settings = BufferSettings(
            groups_per_step=GROUPS_PER_STEP, max_lag=max_lag, max_failed_share=1.0, reuse=reuse
        )
        self.lives = 0
        self.store = self.opened()
        self.fates: dict[int, Fate] = {}
        self.issues: list[tuple[int, Fate | None]] = []  # not yet durable; the group, and what it was before
        self.given_up = dict.fromkeys(WORKERS, 0)  # how often each was given up; the next has another name
        self.version = 0  # of the learner
        self.landed_versions = [0]
        self.history: list[list[int]] = []  # groups of each step that led to the learner's present weights
        self.log_size = self.log.stat().st_size

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.patch.stop()
            self.store.close()
            shutil.rmtree(self.folder)

    # The model --------------------------------------------------------------------------------------------------------

    def ids(self, *states: str) -> list[int]:
        return ids(self.fates, *states)

    @property
    def in_steps(self) -> int:
        return self.version - self.store.version  # the step that engines are being given, and one ahead of it

    @property
    def free(self) -> bool:
        held = len(self.ids("issued", "waiting", "complete")) + GROUPS_PER_STEP * self.in_steps
        return held < (self.settings.max_lag + 1) * GROUPS_PER_STEP

    @property
    def run_folder(self) -> Path:
        return self.folder / str(self.lives)

    def opened(self) -> ReplayStore:
        return ReplayStore(self.run_folder, task_of, self.settings, seed=7)

    def note_what_is_durable(self) -> None:
        if not self.store._ledger._unsynced:
            self.issues.clear()
            self.log_size = self.log.stat().st_size

    @property
    def log(self) -> Path:
        return self.run_folder / "ledger.sqlite-wal"

    def die(self, data: st.DataObject) -> None:
        """Open what the disk has; of what was not synced, as much as chance leaves."""
        self.note_what_is_durable()
        killed, dead = self.store, self.run_folder
        self.lives += 1
        shutil.copytree(dead, self.run_folder)
        self.disk.lose(data, self.run_folder, self.log_size)
        killed.close()
        shutil.rmtree(dead)
        self.store = self.opened()
        with sqlite3.connect(self.run_folder / "ledger.sqlite") as db:
            known = dict(db.execute("SELECT group_id, attempt FROM groups").fetchall())
        db.close()
        self.forget_lost_issues(known)
        self.log_size = self.log.stat().st_size

    def forget_lost_issues(self, known: dict[int, int]) -> None:
        """Of the issues that were not durable, the last ones may be lost. known: newest attempts, by group."""
        while self.issues:
            group_id, before = self.issues[-1]
            if known.get(group_id) == self.fates[group_id].slot.attempt:
                break
            self.issues.pop()
            if before is None:
                del self.fates[group_id]
            else:
                self.fates[group_id] = before
        self.issues.clear()

    def call(self, data: st.DataObject, call: Callable[[], T]) -> T:
        """The answer; perhaps the process dies within the call or before its answer arrives, and it is repeated."""
        fortune = data.draw(st.sampled_from(["well", "well", "well", "answer lost", "died within"]))
        if fortune == "died within":
            self.disk.kill_in = data.draw(st.integers(0, 2))
            try:
                answer = call()
            except Died:
                self.die(data)
                answer = call()
            self.disk.kill_in = None
        else:
            answer = call()
        if fortune == "answer lost":
            if data.draw(st.booleans()):
                self.die(data)
            answer = call()
        return answer

    # Workers ----------------------------------------------------------------------------------------------------------

    @rule(data=st.data(), worker=st.sampled_from(WORKERS), worker_loop=st.integers(0, 2))
    def reserve(self, data: st.DataObject, worker: str, worker_loop: int) -> None:
        def reserve() -> Assignment | None:
            name = worker + self.given_up[worker] * "+"
            expected = next_slot(self.fates, name, worker_loop, self.store.version, self.free)
            given = self.store.reserve(name, worker_loop)
            assert (given and given.slot) == expected
            if given is not None:
                group_id, before = given.slot.group_id, deepcopy(self.fates.get(given.slot.group_id))
                if before is None or (before.slot, before.state) != (given.slot, "issued"):
                    self.issues.append((group_id, before))
                    turns = {} if before is None or before.state == "again" else before.turns
                    self.fates[group_id] = Fate(given.slot, (name, worker_loop), turns=turns)
            return given

        if (given := self.call(data, reserve)) is not None:
            self.compare_turns(given.slot.group_id, given.turns)

    def compare_turns(self, group_id: int, rows: pa.RecordBatch | None) -> None:
        fate, resume_from = self.fates[group_id], {} if rows is None else restore_turns(rows)
        found = {
            index: [s.action_ids.tolist() for s in episode.turns] for index, episode in resume_from.items()
        }
        assert found == fate.tokens
        for index, episode in resume_from.items():
            assert episode.snapshot == b"%d after %d" % (index, len(episode.turns))
            versions = [int(s.versions[0]) for s in episode.turns]
            assert versions == [version for _, version in fate.turns[index]]
            assert all(fate.slot.version <= version <= self.store.version for version in versions)

    @precondition(lambda self: self.fates)
    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        turns, meant = some_turns(data, self.fates, self.store.version)
        candidates = self.ids("issued")
        several = (
            st.lists(st.sampled_from(candidates), max_size=2, unique=True) if candidates else st.just([])
        )
        self.finish(data, turns, meant, data.draw(several))

    def finish(
        self,
        data: st.DataObject,
        turns: list[pa.RecordBatch],
        meant: list[tuple[int, int, int, int]],
        group_ids: list[int],
    ) -> None:
        finished, results = [], {}
        for group_id in group_ids:
            slot = self.fates[group_id].slot
            versions = st.integers(slot.version, self.store.version)
            results[group_id] = sampled_by = data.draw(st.tuples(versions, versions))
            group = played(slot, sampled_by)
            finished.append((slot, encode(group), [EpisodeRow.of(t) for t in group.trajectories]))
        answers = self.call(data, lambda: self.store.commit(turns, finished))
        # An issue that was lost with the machine while the call was under way: the call is too late for it.
        for (slot, *_), answer in zip(finished, answers, strict=True):
            still = self.fates.get(slot.group_id)
            assert (answer is None) == (still is not None and still.slot == slot)
            if answer is None and still is not None:
                still.state, still.sampled_by, still.turns = "complete", max(results[slot.group_id]), {}
                self.issues.clear()
        for group_id, episode, turn, version in meant:
            fate = self.fates.get(group_id)
            if fate is not None and fate.state == "issued":
                fate.turns.setdefault(episode, [])[turn:] = [(fate.slot.attempt, version)]
                self.issues.clear()  # a turn that is durable belongs to a group that is

    @rule(data=st.data(), slow=st.integers(0, 2))
    def a_step_of_work(self, data: st.DataObject, slow: int) -> None:
        """Rare by chance alone: everyone plays, some finish, the learner goes one step on."""
        for worker in WORKERS:
            for worker_loop in range(3):
                self.reserve(data, worker, worker_loop)
        for group_id in self.ids("issued")[slow:]:
            if group_id in self.ids("issued"):
                self.finish(data, [], [], [group_id])
        if self.in_steps < 2:
            self.take(data)
        while self.in_steps:
            self.release(data)
        if self.ids("issued"):
            self.commit(data)

    @precondition(lambda self: self.settings.max_lag > 0)
    @rule(data=st.data())
    def a_learner_lost_between_turns(self, data: st.DataObject) -> None:
        self.a_step_of_work(data, slow=1)
        self.rollback(data)

    @precondition(lambda self: self.ids("issued"))
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        fate = self.fates[data.draw(st.sampled_from(self.ids("issued")))]
        self.call(data, lambda: self.store.drop(fate.slot, DropReason.FAILED, "no route to host"))
        fate.state, fate.turns = "dropped", {}

    @rule(data=st.data(), worker=st.sampled_from(WORKERS))
    def reassign(self, data: st.DataObject, worker: str) -> None:
        name = worker + self.given_up[worker] * "+"
        self.call(data, lambda: self.store.reassign(name))
        self.given_up[worker] += 1
        for group_id in self.ids("issued"):
            if (holder := self.fates[group_id].holder) and holder[0] == name:
                self.fates[group_id].state = "waiting"

    @rule(data=st.data(), worker=st.sampled_from(WORKERS), worker_loop=st.integers(0, 2))
    def one_that_is_gone_is_given_nothing(self, data: st.DataObject, worker: str, worker_loop: int) -> None:
        for life in range(self.given_up[worker]):
            assert self.call(data, lambda: self.store.reserve(worker + life * "+", worker_loop)) is None  # noqa: B023

    @precondition(lambda self: self.fates)
    @rule(data=st.data())
    def a_stale_slot_is_refused(self, data: st.DataObject) -> None:
        slot = stale_slot(data, self.fates[data.draw(st.sampled_from(sorted(self.fates)))])
        (stale,) = self.store.commit([], [(slot, encode(played(slot, (0, 0))), [])])
        assert isinstance(stale, StaleSlot)
        with pytest.raises(StaleSlot, match=f"group {slot.group_id}, attempt {slot.attempt}, holds no slot"):
            self.store.drop(slot, DropReason.FAILED)

    # The learner ------------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.in_steps < 2)
    @rule(data=st.data())
    def take(self, data: st.DataObject) -> None:
        batches = self.call(data, lambda: self.store.take(self.version))
        if batches is None:
            assert len(self.ids("complete")) < GROUPS_PER_STEP or self.ids("issued", "waiting")
            return
        given = [decode(batch) for batch in batches]
        groups = given[:GROUPS_PER_STEP]
        self.reuse.take(self.fates, self.version, given[GROUPS_PER_STEP:])
        ids = [group.slot.group_id for group in groups]
        assert ids == sorted(ids)
        assert len(ids) == GROUPS_PER_STEP
        for group in groups:
            fate = self.fates[group.slot.group_id]
            assert (group.slot, fate.state, group.reuse) == (fate.slot, "complete", 0)
            mine = [fate.slot.group_id, fate.slot.attempt]
            assert [t.turns[0].action_ids.tolist() for t in group.trajectories] == [
                [*mine, 0, 0],
                [*mine, 1, 0],
            ]
            oldest = min(int(t.turns[0].versions.min()) for t in group.trajectories)
            assert self.version - oldest <= self.version - fate.slot.version <= self.settings.max_lag
            fate.state, fate.taken_at = "taken", self.version
        if self.settings.max_lag == 0:
            assert ids == [i for i in sorted(self.fates) if self.fates[i].taken_at == self.version]
        self.history.append(ids)
        self.version += 1

    @precondition(lambda self: self.in_steps)
    @rule(data=st.data())
    def the_step_asked_again_gets_the_same(self, data: st.DataObject) -> None:
        batches = self.call(data, lambda: self.store.take(self.version - 1))
        reused = self.reuse.used.get(self.version - 1, [])
        assert [decode(batch).slot.group_id for batch in batches or []] == self.history[-1] + reused

    @precondition(lambda self: self.in_steps)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        version = self.store.version + 1
        self.call(data, lambda: self.store.release(version))

    @precondition(lambda self: self.in_steps and self.fates[self.history[-1][0]].state == "taken")
    @rule(data=st.data())
    def discard(self, data: st.DataObject) -> None:
        """The learner could make no step of what it took."""
        self.call(data, lambda: self.store.discard(self.version - 1, DropReason.NONFINITE))
        for group_id in self.history.pop():
            self.fates[group_id].state, self.fates[group_id].taken_at = "dropped", -1
        self.reuse.discard(self.version - 1)
        self.version -= 1

    @rule(data=st.data())
    def save(self, data: st.DataObject) -> None:
        self.call(data, lambda: self.store.checkpointed(self.version))
        self.landed_versions = sorted({*self.landed_versions, self.version})
        for group_id in self.ids("taken"):
            self.fates[group_id].state = "trained"

    @precondition(lambda self: self.version > 0)
    @rule(data=st.data())
    def rollback(self, data: st.DataObject) -> None:
        version = data.draw(st.sampled_from(self.landed_versions[-2:]))
        self.call(data, lambda: self.store.rollback(version))
        self.version = version
        self.landed_versions = [landed for landed in self.landed_versions if landed <= version]
        del self.history[version:]
        self.reuse.go_back(version)
        for fate in self.fates.values():
            fate.go_back(version, self.settings.max_lag)

    @precondition(lambda self: self.lives < self.version + 3)
    @rule(data=st.data())
    def killed(self, data: st.DataObject) -> None:
        self.die(data)

    # What must always be so -------------------------------------------------------------------------------------------

    @invariant()
    def the_ledger_agrees(self) -> None:
        if not hasattr(self, "store"):
            return
        self.note_what_is_durable()
        with sqlite3.connect(self.run_folder / "ledger.sqlite") as db:
            rows = db.execute("SELECT group_id, attempt, state, taken_version FROM groups").fetchall()
            reuses = db.execute("SELECT group_id, version, discarded FROM reuses").fetchall()
        db.close()
        assert set(reuses) == self.reuse.rows
        assert [row[0] for row in rows] == list(range(len(self.fates)))
        for group_id, attempt, state, taken_version in rows:
            fate = self.fates[group_id]
            assert (attempt, state) == (fate.slot.attempt, fate.state)
            assert (taken_version is not None) == (state in ("taken", "trained"))
        counts = self.store.counts()
        assert counts["issued"] == counts["trained"] + counts["dropped"] + counts["in_flight"] == len(rows)
        assert counts["in_flight"] == len(self.ids("issued", "waiting", "again", "complete", "taken"))
        assert self.store.ready == len(self.ids("complete"))
        assert self.store.unassigned == len(self.ids("waiting", "again"))

    @invariant()
    def the_journal_agrees(self) -> None:
        if hasattr(self, "store"):
            for group_id in self.ids("issued", "waiting"):
                self.compare_turns(group_id, self.store._journal.turns(group_id))

    @invariant()
    def every_group_is_in_the_weights_once_or_waits(self) -> None:
        if not hasattr(self, "store"):
            return
        learned = [group_id for each in self.history for group_id in each]
        assert len(learned) == len(set(learned))
        assert sorted(learned) == self.ids("taken", "trained")


TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.settings = settings(max_examples=30, stateful_step_count=40)
