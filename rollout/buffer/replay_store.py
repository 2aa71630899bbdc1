"""The store of a run: ledger, journal and segments on disk ARE the buffer; memory is a cache of them.

The process may be killed at any time. Another one that opens the same folder continues after the last call that
returned, and a call that did not return may be repeated. Rows are synced before the ledger refers to them, memory is
updated after the ledger, and a call returns after both. A failed call has changed nothing. One user at a time.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow as pa

from rollout.buffer.commit import FinishedGroup, accepted, write
from rollout.buffer.disk_space import DiskSpace, free_bytes
from rollout.buffer.failures import WINDOW, FailureWindow, TooManyFailures
from rollout.buffer.journal import Journal, rows_of
from rollout.buffer.leases import Lease, Leases
from rollout.buffer.ledger import EpisodeRow, Ledger
from rollout.buffer.ledger_checks import LEDGER
from rollout.buffer.new_groups import ALONE, NewGroups, Owner
from rollout.buffer.reuse import Reuse
from rollout.buffer.scheduler import StalenessScheduler
from rollout.buffer.segments import (
    CompleteGroup,
    CorruptSegment,
    ReusedGroup,
    SegmentWriter,
    remove_oldest,
    write_once,
)
from rollout.buffer.settings import BufferSettings
from rollout.buffer.state_copy import StateCopy
from rollout.buffer.stored_groups import load, roll_back
from rollout.wire.partition import WHOLE, Partition, StepTorn
from rollout.wire.trajectory import Assignment, DropReason, Slot, StaleSlot, Task

__all__ = ["BufferSettings", "EpisodeRow", "FinishedGroup", "ReplayStore", "TooManyFailures"]

log = logging.getLogger(__name__)


class ReplayStore:
    """Everything sampled and not yet trained.

    total_steps: learner steps of the run, which bound the groups issued. probe: returns the free bytes on a folder's
    disk. seed: of the run; it decides which groups are reused. owner: whose groups these are. copy: the copy in shared
    storage of what is in `folder`, which the caller asks for by `ship`; run_folder: the run's own, if it is another.
    """

    def __init__(
        self,
        folder: Path,
        task_of: Callable[[int], Task],
        settings: BufferSettings,
        total_steps: int | None = None,
        probe: Callable[[Path], int] = free_bytes,
        seed: int = 0,
        owner: Owner = ALONE,
        copy: StateCopy | None = None,
        run_folder: Path | None = None,
    ) -> None:
        self._run_folder = run_folder or folder
        self._copy = copy
        self._fetch: Callable[[Collection[int]], None] = copy.fetch if copy else lambda segments: None
        self.settings = settings
        self._total = None if total_steps is None else total_steps * settings.groups_per_step
        self.disk_space = DiskSpace(folder, settings.min_free_mib, probe)
        self._groups = folder / "groups"
        first, durable = (0, True) if copy is None else (copy.next_segment, False)
        self._segments = SegmentWriter(self._groups, settings.segment_mib * 2**20, first, durable)
        self._ledger = Ledger(folder / LEDGER, record=not durable)
        self._reuse = Reuse(settings.reuse, seed, self._ledger.db, self._groups)
        self._new = NewGroups(owner, settings.curriculum, task_of, seed, self._ledger.db)
        self._next_id = self._ledger.next_group_id()
        self._scheduler = self._empty_buffer(self._ledger.buffer_version)
        if copy is not None:
            copy.follow(self._ledger)
        self._leases = Leases(self._ledger.evicted(), self._ledger.losses())
        load(self._ledger.since(self.version), self._scheduler, self._leases)
        self._fetch(self._needed_segments())
        self._failures = FailureWindow(settings.max_failed_share, self._ledger.recent_episodes(WINDOW))
        begin, attempts = self._ledger.journal_from, self._leases.attempts
        self._journal = Journal(folder / "turns", begin, attempts, durable=durable)
        if self._journal.damaged:
            rewritten = self._journal.rewrite(self._leases.attempts)
            self._ledger.reissue([], rewritten.first)
            self._journal.adopt(rewritten)
        self.ship()

    @property
    def version(self) -> int:
        """Weight version of the engines."""
        return self._scheduler.version

    @property
    def ready(self) -> int:
        """Complete groups that no step has taken."""
        return self._scheduler.complete

    @property
    def in_step(self) -> int:
        """Groups of steps that are not released."""
        return self._scheduler.in_steps

    @property
    def leases(self) -> list[tuple[int, str]]:
        """Groups being played, each with its worker."""
        return [(group_id, lease.worker) for group_id, lease in self._leases.playing.items()]

    @property
    def plays_alone(self) -> bool:
        """Whether a worker plays a suspected group alone (`Leases`)."""
        return self._leases.any_alone

    @property
    def unassigned(self) -> int:
        """Groups that were issued before and have no worker."""
        return len(self._leases.waiting) + len(self._leases.reissue)

    @property
    def covered(self) -> bool:
        """Whether engines hold the run's last version. Before that the last step may be discarded and need groups."""
        return self._total is not None and self.version * self.settings.groups_per_step >= self._total

    def is_evicted(self, worker: str) -> bool:
        """Whether this worker was evicted: its process may still run, with weights that are not updated."""
        return worker in self._leases.evicted

    def reserve(self, worker: str, worker_loop: int) -> Assignment | None:
        """Return the next group for one of a worker's loops, or None while no slot is free. Raises OutOfDiskSpace.

        Groups that wait for a worker come first, then those to reissue, each in order of group id. A loop that holds a
        group gets that one again: its last answer was lost.
        """
        self.disk_space.require()
        slot = None if worker in self._leases.evicted else self._next_slot(worker, worker_loop)
        if slot is None:
            return None
        if not self._leases.is_current(slot):
            self._ledger.issue(slot, worker, worker_loop)
            if not self._leases.has_slot(slot.group_id):
                self._scheduler.reserve(slot.group_id)
            self._leases.grant(Lease(slot, worker, worker_loop))
            self._next_id = max(self._next_id, slot.group_id + 1)
        return Assignment(slot, self._journal.turns(slot.group_id), self._leases.losses.get(slot.group_id, 0))

    def commit(
        self, turns: Sequence[pa.RecordBatch], finished: Sequence[FinishedGroup]
    ) -> list[StaleSlot | None]:
        """Store turns and finished groups durably, with one sync of each file; repeated ones are stored once.

        Rows of groups and attempts without a lease are ignored. Returns the error of each finished group, or None.
        Raises OutOfDiskSpace, OSError or sqlite3.Error, having changed nothing.
        """
        self.disk_space.require()
        new, answers = accepted(finished, self._leases, self._ledger)
        attempts = {at: lease.slot.attempt for at, lease in self._leases.playing.items() if at not in new}
        rows = [kept for batch in turns if (kept := rows_of(batch, attempts)) is not None]
        before = self._segments.open_segment
        locations = write(rows, new, self._ledger, self._segments, self._journal)
        for group_id, (slot, batch, episodes) in new.items():
            self._scheduler.add(group_id, CompleteGroup(slot, locations[group_id], batch))
            self._failures.count((row.end_reason, row.error) for row in episodes)
        self._end(new)
        if self._segments.open_segment != before:
            self._trim()
        return answers

    def drop(
        self, slot: Slot, reason: DropReason, error: str = "", episodes: Sequence[EpisodeRow] = ()
    ) -> None:
        """Drop a group; its slot is free at once. Raises StaleSlot."""
        if not self._leases.is_current(slot):
            if self._ledger.attempt_and_state(slot.group_id) == (slot.attempt, "dropped"):
                return
            raise StaleSlot.of(slot)
        self._ledger.drop(slot, reason, error, episodes)
        self._scheduler.drop(slot.group_id)
        self._failures.count(((row.end_reason, row.error) for row in episodes), error)
        self._end([slot.group_id])

    def reassign(self, worker: str, lost: str = "") -> int:
        """Let a worker's groups wait for other workers, with slots, deadlines and turns; returns how many there are.

        lost: the error by which the worker was lost. A suspected group that it played alone is dropped (`Leases`).
        """
        if lost and (cause := self._leases.cause_of_loss(worker)) is not None:
            self.drop(cause, DropReason.CRASHED, lost)
        given_up = self._leases.of_worker(worker)
        self._ledger.reassign(worker, given_up, bool(lost))
        self._leases.evicted.add(worker)
        self._leases.count_loss(given_up if lost else ())
        self._leases.reassign(given_up)
        return len(given_up)

    def take(self, version: int, share: Partition = WHOLE) -> list[pa.RecordBatch] | None:
        """Return the groups of the step from `version` to the next, in order of group id; None while not ready.

        The learner may stand one step before the engines, whom the step before it was not released for yet. The groups
        it reuses follow. A repeated call returns the same groups, and a rank the same share. Raises
        TooManyFailures and StepTorn.
        """
        if not self._scheduler.may_take(version):
            raise ValueError(f"take({version}) does not follow version {self.version}; call rollback() first")
        if taken := self._scheduler.taken(version):
            if (batches := self._read(version, taken, self._reuse.of(version))) is not None:
                return share.of(batches)
            if share != WHOLE:
                raise StepTorn(
                    f"rows of the step after version {version} are lost, and other ranks may have their share"
                )
        self._failures.require_below_limit()
        while (chosen := self._scheduler.choose(version)) is not None:
            reused = self._reuse.choose(version)
            if (batches := self._read(version, chosen, reused)) is not None:
                self._ledger.take([at for at, _ in chosen], version, [each.group_id for each in reused])
                self._scheduler.take(version)
                for _, group in chosen if share == WHOLE else ():
                    group.batch = None  # a repeated call reads it from disk
                return share.of(batches)
        return None

    def discard(self, version: int, reason: DropReason) -> None:
        """Drop the groups that the step after `version` has taken and cannot train on; it then takes others.

        Their rows are kept under RUN/discarded, even when their segments are removed.
        """
        taken = self._scheduler.taken(version)
        if taken and (batches := self._read(version, taken, self._reuse.of(version))):
            write_once(self._run_folder / "discarded" / f"version-{version:08d}", batches)
            self._ledger.discard([group_id for group_id, _ in taken], reason, version)
            self._scheduler.discard(version)

    def release(self, version: int) -> None:
        """Engines hold `version`: free the slots of the groups it was trained on."""
        if version == self.version:
            return
        if version == self.version + 1 and self._scheduler.taken(self.version):
            self._ledger.release(version)
        self._scheduler.release(version)

    def checkpointed(self, version: int) -> None:
        """A checkpoint of `version` is on disk: mark the groups in it as trained."""
        self._ledger.checkpointed(version)
        self._trim()

    def rollback(self, version: int, new_driver: bool = False) -> None:
        """The learner continues from the checkpoint of `version`. new_driver: names of evicted workers are free again.

        Groups outside of the checkpoint that are complete stay complete if `version` or older weights sampled them and
        they can still meet the lag bound. Groups being played wait for a worker, with the turns that such weights
        sampled, under the same condition. All others are reissued: same group id and task, next attempt.
        """
        buffer = self._empty_buffer(version)
        stored = self._ledger.since(version)
        self._fetch({each.location.segment for each in stored if each.location is not None})
        complete, waiting, reissue = roll_back(stored, version, buffer, self._groups)
        rewritten = self._journal.rewrite(waiting, up_to=version)
        self._ledger.rollback(version, complete, waiting, reissue, rewritten.first, new_driver)
        self._journal.adopt(rewritten)
        self._scheduler = buffer
        self._new.forget()
        self._leases = Leases(self._ledger.evicted(), self._ledger.losses())
        self._leases.waiting, self._leases.reissue = waiting, reissue
        self._fetch(self._needed_segments())

    def archive(self, name: str, batches: Sequence[pa.RecordBatch]) -> None:
        """Store rows that are not trained on (evaluations) under RUN/evaluations/NAME; a repeated call does nothing."""
        self.disk_space.require()
        write_once(self._run_folder / "evaluations" / name, batches)

    def counts(self) -> dict[str, int]:
        """The ledger's balance: issued = trained + dropped + in_flight."""
        return self._ledger.counts()

    def ship(self) -> None:
        """Return when the copy, if there is one, has everything that was done so far. May be repeated after an OSError.

        Raises Fenced if another replay buffer has taken over.
        """
        if self._copy is not None:
            self._copy.ship(self._segments.open_segment)

    def close(self) -> None:
        try:
            self._segments.close()
            self._journal.close()
            if self._copy is not None:
                self._copy.close()
        finally:
            self._ledger.close()

    def _empty_buffer(self, version: int) -> StalenessScheduler[CompleteGroup]:
        return StalenessScheduler(self.settings.groups_per_step, self.settings.max_lag, version)

    def _next_slot(self, worker: str, worker_loop: int) -> Slot | None:
        leases = self._leases
        if (slot := leases.of_loop(worker, worker_loop)) is not None:
            # The holder has recorded turns, so it had the answer: the caller is another process of that name, and calls
            # of the old one must be refused.
            played = self._journal.has_turns_of(slot.group_id, slot.attempt)
            return replace(slot, attempt=slot.attempt + 1) if played else slot
        if leases.plays_alone(worker):
            return None
        if (slot := leases.next_waiting(worker)) is not None:
            return slot
        if self._scheduler.outstanding >= self._scheduler.capacity:
            return None
        if (slot := leases.next_reissue(worker, self.version)) is not None:
            return self._new.again(slot)
        begun = self.version * self.settings.groups_per_step + self._scheduler.outstanding
        if self._total is not None and begun >= self._total:
            return None
        return self._new.slot(self._next_id, self.version)

    def _end(self, group_ids: Collection[int]) -> None:
        self._leases.end(group_ids)
        self._journal.finish(group_ids)

    def _read(
        self, version: int, groups: Sequence[tuple[int, CompleteGroup]], reused: Sequence[ReusedGroup]
    ) -> list[pa.RecordBatch] | None:
        """Read the rows of the step after `version`; None where some are lost: fresh groups are then reissued."""
        try:
            fresh = [group.read(self._groups) for _, group in groups]
            return fresh + [group.read(self._groups) for group in reused]
        except CorruptSegment as error:
            self._set_aside(version, error)
            return None

    def _set_aside(self, version: int, error: CorruptSegment) -> None:
        # A repeated call means that the step has received none of its groups.
        self._ledger.give_back([group_id for group_id, _ in self._scheduler.taken(version)], version)
        self._scheduler.give_back(version)
        complete = self._scheduler.completed.items()
        lost = {at: group.slot for at, group in complete if group.location.segment == error.segment}
        aside = self._segments.set_aside(error.segment)
        log.warning("%s; set aside as %s, groups reissued: %s", error, aside.name, sorted(lost))
        rewritten = self._journal.rewrite(self._leases.attempts)  # drops the turns of these groups
        self._ledger.reissue(lost, rewritten.first)
        self._journal.adopt(rewritten)
        for group_id in lost:
            self._scheduler.drop(group_id)
        self._leases.reissue |= lost

    def _trim(self) -> None:
        limit = None if self.settings.disk_gib is None else self.settings.disk_gib * 2**30
        if self._copy is not None:
            self._copy.trim(self._needed_segments(), limit)
        elif limit is not None:
            remove_oldest(self._groups, limit, self._needed_segments() | {self._segments.open_segment})

    def _needed_segments(self) -> set[int]:
        # A step's groups may be trained before it is released: the checkpoint was written while engines loaded.
        steps = [*self._scheduler.taken(self.version), *self._scheduler.taken(self.version + 1)]
        held = {group.location.segment for _, group in steps}
        return held | self._ledger.segments_in_use() | self._reuse.segments_in_use(self.version)
