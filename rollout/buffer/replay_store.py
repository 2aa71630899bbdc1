"""The store: ledger, journal and segments on disk ARE the buffer; what is in memory is a cache of them.

A process may be killed at any instant. Another one that opens the same folder stands where the last call that returned
had left it, and a call that did not return may be repeated. Order matters and is always the same: rows are synced
before the ledger refers to them, memory follows the ledger, and nobody is handed a slot or a batch before the ledger
has it. So a call that fails has changed nothing. One user at a time.
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow as pa

from rollout.buffer.disk_space import Room, free_bytes
from rollout.buffer.failures import WINDOW, FailureWindow, TooManyFailures
from rollout.buffer.journal import Journal, rows_of
from rollout.buffer.leases import Held, Holders
from rollout.buffer.ledger import EpisodeRow, Ledger
from rollout.buffer.payload import Complete, Reused
from rollout.buffer.reuse import Reuse
from rollout.buffer.scheduler import StalenessScheduler
from rollout.buffer.segments import (
    CorruptSegment,
    Location,
    SegmentWriter,
    remove_oldest,
    write_once,
)
from rollout.buffer.settings import BufferSettings
from rollout.wire.partition import WHOLE, Partition, StepTorn
from rollout.wire.trajectory import Assignment, DropReason, Slot, StaleSlot, Task

__all__ = ["BufferSettings", "EpisodeRow", "Finished", "ReplayStore", "TooManyFailures"]

log = logging.getLogger(__name__)

Finished = tuple[Slot, pa.RecordBatch, Sequence[EpisodeRow]]  # a group as it is handed in


class ReplayStore:
    """Everything sampled and not yet trained.

    `total_steps` bounds what is given out. `probe` says how many bytes are free on the disk of a folder. `seed` is the
    run's: of what is reused.
    """

    def __init__(
        self,
        folder: Path,
        task_of: Callable[[int], Task],
        settings: BufferSettings,
        total_steps: int | None = None,
        probe: Callable[[Path], int] = free_bytes,
        seed: int = 0,
    ) -> None:
        self._folder = folder
        self._task_of = task_of
        self.settings = settings
        self._total = None if total_steps is None else total_steps * settings.groups_per_step
        self.room = Room(folder, settings.min_free_mib, probe)
        self._groups = folder / "groups"
        self._segments = SegmentWriter(self._groups, settings.segment_mib * 2**20)
        self._ledger = Ledger(folder / "ledger.sqlite")
        self._reuse = Reuse(settings.reuse, seed, self._ledger.db, self._groups)
        self._next_id = self._ledger.next_group_id()
        self._scheduler = self._empty_buffer(self._ledger.buffer_version)
        self._holders = Holders(self._ledger.gone(), self._ledger.losses())
        self._load()
        self._failures = FailureWindow(settings.max_failed_share, self._ledger.recent_episodes(WINDOW))
        self._journal = Journal(folder / "turns", self._ledger.journal_from, self._holders.attempts)
        if self._journal.damaged:
            rewritten = self._journal.rewrite(self._holders.attempts)
            self._ledger.lose([], rewritten.first)
            self._journal.adopt(rewritten)

    @property
    def version(self) -> int:
        """The weight version that engines hold."""
        return self._scheduler.version

    @property
    def ready(self) -> int:
        """Complete groups that no step has taken."""
        return self._scheduler.complete

    @property
    def in_step(self) -> int:
        """Groups of a step that is not released yet."""
        return len(self._scheduler.taken)

    @property
    def holders(self) -> list[tuple[int, str]]:
        """The groups being played, each with its worker."""
        return [(group_id, held.worker) for group_id, held in self._holders.playing.items()]

    @property
    def plays_alone(self) -> bool:
        """Whether a worker plays one group and is given no other."""
        return self._holders.any_alone

    @property
    def unassigned(self) -> int:
        """Groups that were given out before and are due to be given out once more."""
        return len(self._holders.waiting) + len(self._holders.again)

    @property
    def covered(self) -> bool:
        """Whether engines hold the run's last version: until then the last step may be refused and need others."""
        return self._total is not None and self.version * self.settings.groups_per_step >= self._total

    def is_gone(self, worker: str) -> bool:
        """Whether this worker was given up: it may live on somewhere, with weights that nobody replaces."""
        return worker in self._holders.gone

    def reserve(self, worker: str, lane: int) -> Assignment | None:
        """The next group for one of a worker's loops, or None while no slot is free. Raises NoRoom.

        Groups whose worker is gone come first, then those to issue anew, each in order of group id. A loop that still
        holds a group gets that one: its last answer was lost.
        """
        self.room.require()
        slot = None if worker in self._holders.gone else self._next_slot(worker, lane)
        if slot is None:
            return None
        if not self._holders.holds(slot):
            self._ledger.issue(slot, worker, lane)
            if not self._holders.keeps_place(slot.group_id):
                self._scheduler.reserve(slot.group_id)
            self._holders.hold(Held(slot, worker, lane))
            self._next_id = max(self._next_id, slot.group_id + 1)
        return Assignment(
            slot, self._journal.turns(slot.group_id), self._holders.losses.get(slot.group_id, 0)
        )

    def commit(self, turns: Sequence[pa.RecordBatch], finished: Sequence[Finished]) -> list[StaleSlot | None]:
        """Store turns and finished groups, durably, with one sync of each file; what is repeated is stored once.

        Rows of groups and attempts that are not held are left out. Returns, for each finished group, what is wrong
        with it. Raises NoRoom, OSError or sqlite3.Error, having changed nothing.
        """
        self.room.require()
        new, answers = self._sort_out(finished)
        playing = self._holders.playing.items()
        attempts = {group_id: held.slot.attempt for group_id, held in playing if group_id not in new}
        rows = [held for batch in turns if (held := rows_of(batch, attempts)) is not None]
        before = self._segments.open_segment
        places = self._write(rows, new)
        for group_id, (slot, batch, episodes) in new.items():
            self._scheduler.add(group_id, Complete(slot, places[group_id], batch))
            self._failures.watch((row.end_reason, row.error) for row in episodes)
        self._let_go(new)
        if self._segments.open_segment != before:
            self._trim()
        return answers

    def drop(
        self, slot: Slot, reason: DropReason, error: str = "", episodes: Sequence[EpisodeRow] = ()
    ) -> None:
        """Give a group up; its slot is free at once. Raises StaleSlot."""
        if not self._holders.holds(slot):
            if self._ledger.fate(slot.group_id) == (slot.attempt, "dropped"):
                return
            raise StaleSlot.of(slot)
        self._ledger.drop(slot, reason, error, episodes)
        self._scheduler.drop(slot.group_id)
        self._failures.watch(((row.end_reason, row.error) for row in episodes), error)
        self._let_go([slot.group_id])

    def reassign(self, worker: str, lost: str = "") -> int:
        """What this worker holds waits for others, slots, deadlines and turns kept; returns how many groups.

        lost: the error by which it was lost. A group that cost others before, and this one all alone, is dropped.
        """
        if lost and (cause := self._holders.cause_of_loss(worker)) is not None:
            self.drop(cause, DropReason.CRASHED, lost)
        given_up = self._holders.of(worker)
        self._ledger.reassign(worker, given_up, bool(lost))
        self._holders.gone.add(worker)
        self._holders.count_loss(given_up if lost else ())
        self._holders.reassign(given_up)
        return len(given_up)

    def take(self, version: int, share: Partition = WHOLE) -> list[pa.RecordBatch] | None:
        """The groups of the step that leads from `version` to the next, in order of group id; None while not ready.

        Behind them come those it reuses. The same step asked again gets the same groups, a rank the same share. Raises
        TooManyFailures and StepTorn.
        """
        asked_again = bool(self._scheduler.taken) and version == self.version
        if version != self.version and not (self._scheduler.taken and version == self.version + 1):
            raise ValueError(f"take({version}) does not follow version {self.version}; rollback() goes back")
        if (
            asked_again
            and (batches := self._read(self._scheduler.taken, self._reuse.of(version))) is not None
        ):
            return share.of(batches)
        if asked_again and share != WHOLE:
            raise StepTorn(
                f"rows of the step after version {version} are lost; its other ranks may have theirs"
            )
        self._failures.require_few()
        while (chosen := self._scheduler.choose()) is not None:
            reused = self._reuse.choose(version)
            if (batches := self._read(chosen, reused)) is not None:
                self._ledger.take([at for at, _ in chosen], version, [each.group_id for each in reused])
                self._scheduler.take()
                for _, group in chosen if share == WHOLE else ():
                    group.batch = None  # should the learner ask again, it is read again
                return share.of(batches)
        return None

    def discard(self, version: int, reason: DropReason) -> None:
        """The step after `version` can not be made of what it took: the groups are dropped, and it takes others.

        Their rows are set aside under RUN/discarded, whatever becomes of their segments.
        """
        taken = self._scheduler.taken if version == self.version else []
        if taken and (batches := self._read(taken, self._reuse.of(version))):
            write_once(self._folder / "discarded" / f"version-{version:08d}", batches)
            self._ledger.discard([group_id for group_id, _ in taken], reason, version)
            self._scheduler.discard()

    def release(self, version: int) -> None:
        """Engines hold `version`: the slots of the groups it was trained on are free."""
        if version == self.version:
            return
        if version == self.version + 1 and self._scheduler.taken:
            self._ledger.release(version)
        self._scheduler.release(version)

    def checkpointed(self, version: int) -> None:
        """A checkpoint of `version` is on disk."""
        self._ledger.checkpointed(version)
        self._trim()

    def rollback(self, version: int, new_driver: bool = False) -> None:
        """The learner goes on from the checkpoint of `version`; with a new driver names of workers begin anew.

        Of the groups it does not hold, the complete ones stay complete when `version` or older weights sampled them and
        they can still meet the lag bound. Those being played wait for a worker, with the turns such weights sampled,
        under the same condition. All others are issued anew: same group id and task, next attempt.
        """
        buffer = self._empty_buffer(version)
        fates: dict[str, dict[int, Slot]] = {"complete": {}, "waiting": {}, "again": {}}
        # Complete groups first: their tokens are all there. (Not all fit where a resumed run has smaller settings.)
        for stored in sorted(self._ledger.since(version), key=lambda stored: stored.location is None):
            slot = stored.slot
            state = stored.fate(version, self.settings.max_lag, self._groups)
            if state != "again" and not buffer.reserve(slot.group_id, issue_version=slot.version):
                state = "again"
            if state == "complete":
                assert stored.location is not None
                buffer.add(slot.group_id, Complete(slot, stored.location, None))
            fates[state][slot.group_id] = slot
        rewritten = self._journal.rewrite(fates["waiting"], up_to=version)
        complete, waiting, again = fates.values()
        self._ledger.rollback(version, complete, waiting, again, rewritten.first, new_driver)
        self._journal.adopt(rewritten)
        self._scheduler = buffer
        self._holders = Holders(self._ledger.gone(), self._ledger.losses())
        self._holders.waiting, self._holders.again = waiting, again

    def archive(self, name: str, batches: Sequence[pa.RecordBatch]) -> None:
        """Store rows that are not trained on (evaluations) under RUN/evaluations/NAME; repeated, nothing more."""
        self.room.require()
        write_once(self._folder / "evaluations" / name, batches)

    def counts(self) -> dict[str, int]:
        """The ledger's balance: issued = trained + dropped + in_flight."""
        return self._ledger.counts()

    def close(self) -> None:
        try:
            self._segments.close()
            self._journal.close()
        finally:
            self._ledger.close()

    # Opening ---------------------------------------------------------------------------------------------------------

    def _load(self) -> None:
        restore = self._scheduler.restore
        for stored in self._ledger.since(self.version):
            slot, group_id = stored.slot, stored.slot.group_id
            match stored.state:
                case "issued":
                    restore(group_id, slot.version, None)
                    self._holders.hold(Held(slot, stored.worker, stored.lane))
                case "waiting":
                    restore(group_id, slot.version, None)
                    self._holders.waiting[group_id] = slot
                case "again":
                    self._holders.again[group_id] = slot
                case state:
                    assert stored.location is not None
                    group = Complete(slot, stored.location, None)
                    # Trained before it is released: its checkpoint landed while engines were still loading.
                    restore(group_id, slot.version, group, taken=state != "complete")

    def _empty_buffer(self, version: int) -> StalenessScheduler[Complete]:
        return StalenessScheduler(self.settings.groups_per_step, self.settings.max_lag, version)

    # Giving out ------------------------------------------------------------------------------------------------------

    def _next_slot(self, worker: str, lane: int) -> Slot | None:
        holders = self._holders
        if (slot := holders.held_by(worker, lane)) is not None:
            # It has recorded turns, so it had the answer: this is another process of that name, and the old one must
            # not be heard any more.
            played = self._journal.has_turns_of(slot.group_id, slot.attempt)
            return replace(slot, attempt=slot.attempt + 1) if played else slot
        if holders.plays_alone(worker):
            return None
        if (slot := holders.next_waiting(worker)) is not None:
            return slot
        if self._scheduler.outstanding >= self._scheduler.capacity:
            return None
        if (slot := holders.next_again(worker, self.version)) is not None:
            return slot
        begun = self.version * self.settings.groups_per_step + self._scheduler.outstanding
        if self._total is not None and begun >= self._total:
            return None
        return Slot(self._next_id, 0, self._task_of(self._next_id), self.version)

    def _let_go(self, group_ids: Collection[int]) -> None:
        self._holders.let_go(group_ids)
        self._journal.finish(group_ids)

    # Rows ------------------------------------------------------------------------------------------------------------

    def _sort_out(self, finished: Sequence[Finished]) -> tuple[dict[int, Finished], list[StaleSlot | None]]:
        new: dict[int, Finished] = {}
        answers: list[StaleSlot | None] = []
        for group in finished:
            slot = group[0]
            if self._holders.holds(slot):
                new.setdefault(slot.group_id, group)
                answers.append(None)
            else:
                fate = self._ledger.fate(slot.group_id)
                there = fate in [(slot.attempt, state) for state in ("complete", "taken", "trained")]
                answers.append(None if there else StaleSlot.of(slot))
        return new, answers

    def _write(self, rows: Sequence[pa.RecordBatch], groups: dict[int, Finished]) -> dict[int, Location]:
        if rows:
            self._ledger.sync()  # no turn on disk without its group
        marks = self._segments.mark(), self._journal.mark()
        try:
            places = {group_id: self._segments.append(batch) for group_id, (_, batch, _) in groups.items()}
            written = self._journal.append(rows)
            if places:
                self._segments.sync()
            if written:
                self._journal.sync()
            if places:
                self._ledger.complete([(slot, places[at], rows) for at, (slot, _, rows) in groups.items()])
        except (OSError, sqlite3.Error):
            self._segments.rewind(marks[0])
            self._journal.rewind(marks[1])
            raise
        self._journal.keep(written)
        return places

    def _read(
        self, groups: Sequence[tuple[int, Complete]], reused: Sequence[Reused]
    ) -> list[pa.RecordBatch] | None:
        """The rows of these groups; None where some are lost: fresh ones are issued again, others are no more."""
        try:
            files = self._groups
            return [*(fresh.read(files) for _, fresh in groups), *(group.read(files) for group in reused)]
        except CorruptSegment as error:
            self._set_aside(error)
            return None

    def _set_aside(self, error: CorruptSegment) -> None:
        # A step that asked for its groups again has none of them, or it would not ask.
        untaken = [group_id for group_id, _ in self._scheduler.taken]
        self._ledger.give_back(untaken, self.version)
        self._scheduler.give_back()
        complete = self._scheduler.completed.items()
        lost = {at: group.slot for at, group in complete if group.location.segment == error.segment}
        aside = self._segments.set_aside(error.segment)
        log.warning("%s; set aside as %s, groups issued again: %s", error, aside.name, sorted(lost))
        rewritten = self._journal.rewrite(self._holders.attempts)  # without turns that these groups once had
        self._ledger.lose(lost, rewritten.first)
        self._journal.adopt(rewritten)
        for group_id in lost:
            self._scheduler.drop(group_id)
        self._holders.again |= lost

    def _trim(self) -> None:
        if (limit := self.settings.disk_gib) is not None:
            needed = self._ledger.segments_in_use() | self._reuse.segments_in_use(self.version)
            remove_oldest(self._groups, limit * 2**30, needed | {self._segments.open_segment})
