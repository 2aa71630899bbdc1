"""The store: replay buffer, ledger and segments as one thing that is durable at every step.

Order matters and is always the same: the payload is synced before the ledger says complete, and the ledger is written
before the buffer moves on. Memory holds what is outstanding only. One writer, not thread-safe.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field

from rollout.wire.ledger import EpisodeRow, Ledger
from rollout.wire.replay import ReplayBuffer
from rollout.wire.segments import Location, SegmentWriter, read_batch
from rollout.wire.trajectory import DropReason, EndReason, Slot, Task

__all__ = ["BufferSettings", "EpisodeRow", "Store", "TooManyFailures"]

_FAILURE_WINDOW = 200  # episodes over which the share of infrastructure failures is judged


class BufferSettings(BaseModel):
    """How many groups a step takes and how old they may be."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    groups_per_step: int = Field(32, gt=0, description="groups of one learner step")
    max_lag: int = Field(1, ge=0, description="weight versions a group may be behind when trained; 0: synchronous")
    segment_mib: int = Field(64, gt=0, description="size at which a segment file of stored rows is closed, MiB")
    max_failed_share: float = Field(
        0.2, ge=0, le=1, description="share of the last 200 episodes that infrastructure may fail before the run stops"
    )


class TooManyFailures(RuntimeError):
    """Environments or engines fail so often that training on the rest would be training on a biased rest."""


class Store:
    """Everything sampled and not yet trained, on disk and in memory.

    `total_steps` bounds what is given out: reserve() answers None for good once the groups of all steps are covered.
    """

    def __init__(
        self,
        folder: Path,
        task_of: Callable[[int], Task],
        settings: BufferSettings,
        total_steps: int | None = None,
    ) -> None:
        self._folder = folder
        self._task_of = task_of
        self._settings = settings
        self._total = None if total_steps is None else total_steps * settings.groups_per_step
        self._groups = folder / "groups"
        self._segments = SegmentWriter(self._groups, settings.segment_mib * 2**20)
        self._ledger = Ledger(folder / "ledger.sqlite")
        self._buffer: ReplayBuffer[pa.RecordBatch] = ReplayBuffer(settings.groups_per_step, settings.max_lag)
        self._next_id = self._ledger.next_group_id()
        self._again: deque[tuple[int, int, Task]] = deque()  # (group id, attempt, task) to issue anew, in order
        self._slots: dict[int, Slot] = {}
        self._recent: deque[bool] = deque(maxlen=_FAILURE_WINDOW)  # True: failed
        self._last_error = ""

    @property
    def version(self) -> int:
        """The weight version that engines hold."""
        return self._buffer.version

    @property
    def covered(self) -> bool:
        """Whether every step of the run has its groups: nothing more will be given out unless one is dropped."""
        if self._total is None or self._again:
            return False
        consumed = self._buffer.version * self._settings.groups_per_step
        return consumed + self._buffer.outstanding >= self._total

    @property
    def ready(self) -> int:
        """Complete groups that no step has taken."""
        return self._buffer.complete

    def holders(self) -> dict[int, Slot]:
        """The slots given out whose groups are not complete."""
        return {group_id: self._slots[group_id] for group_id in self._buffer.waiting_ids()}

    def reserve(self, worker: str) -> Slot | None:
        """The next group for a worker, or None while no slot is free (or, see `covered`, none will ever be)."""
        if self.covered or self._buffer.outstanding >= self._buffer.capacity:
            return None
        if self._again:
            group_id, attempt, task = self._again.popleft()
        else:
            group_id, attempt, task = self._next_id, 0, self._task_of(self._next_id)
            self._next_id += 1
        slot = Slot(group_id, attempt, task, self._buffer.version)
        self._ledger.issue(slot, worker)
        self._buffer.reserve(group_id)
        self._slots[group_id] = slot
        return slot

    def append(self, slot: Slot, batch: pa.RecordBatch) -> Location:
        """Write a finished group's rows; `commit` makes them count."""
        self._require_held(slot)
        return self._segments.append(batch)

    def sync(self) -> None:
        """Make all appended rows durable. Safe to call from another thread than the writer's while it does not write."""
        self._segments.sync()

    def commit(self, finished: Sequence[tuple[Slot, pa.RecordBatch, Location, Sequence[EpisodeRow]]]) -> None:
        """Groups whose rows are synced are complete."""
        self._ledger.complete([(slot, location, episodes) for slot, _, location, episodes in finished])
        for slot, batch, _, episodes in finished:
            self._buffer.add(slot.group_id, batch)
            self._watch_failures(episodes)

    def add(self, slot: Slot, batch: pa.RecordBatch, episodes: Sequence[EpisodeRow]) -> None:
        """append, sync and commit of one group."""
        location = self.append(slot, batch)
        self.sync()
        self.commit([(slot, batch, location, episodes)])

    def drop(self, slot: Slot, reason: DropReason, error: str = "", episodes: Sequence[EpisodeRow] = ()) -> None:
        """Give a group up; its slot is free at once."""
        self._require_held(slot)
        self._ledger.drop(slot, reason, error, episodes)
        self._buffer.drop(slot.group_id)
        del self._slots[slot.group_id]
        if error:
            self._last_error = error.strip().splitlines()[-1]
        self._watch_failures(episodes)

    def take(self) -> list[pa.RecordBatch] | None:
        """The next step's groups in order of group id, or None while they are not ready."""
        self._require_few_failures()
        taken = self._buffer.take()
        if taken is None:
            return None
        self._ledger.take([group_id for group_id, _ in taken], self._buffer.version)
        for group_id, _ in taken:
            del self._slots[group_id]
        return [batch for _, batch in taken]

    def release(self, version: int) -> None:
        """Engines hold `version`: the slots of the groups it was trained on are free."""
        self._buffer.release(version)

    def landed(self, version: int) -> None:
        """A checkpoint of `version` is on disk."""
        self._ledger.landed(version)

    def recover(self, version: int) -> None:
        """Go on from the checkpoint of `version`.

        Groups the checkpoint does not contain are complete again when the weights that sampled them are ones this run
        still has and they can still meet the lag bound; all others are issued anew, same group id and task, next
        attempt, in order. Called once, before anything is reserved.
        """
        self._ledger.landed(version)  # the crash may have come between the checkpoint and its record
        self._buffer = ReplayBuffer(self._settings.groups_per_step, self._settings.max_lag, version)
        for stored in self._ledger.unfinished():
            slot = stored.slot
            if self._usable(stored.max_version, slot.version, version) and stored.location is not None:
                self._buffer.reserve(slot.group_id, issue_version=slot.version)
                self._slots[slot.group_id] = slot
                batch = read_batch(self._groups, stored.location)
                self._ledger.complete([(slot, stored.location, ())])
                self._buffer.add(slot.group_id, batch)
            else:
                self._again.append((slot.group_id, slot.attempt + 1, slot.task))

    def archive(self, name: str, batches: Sequence[pa.RecordBatch]) -> None:
        """Store rows that are not trained on (evaluations) under RUN/evaluations/NAME."""
        writer = SegmentWriter(self._folder / "evaluations" / name, self._settings.segment_mib * 2**20)
        for batch in batches:
            writer.append(batch)
        writer.close()

    def counts(self) -> dict[str, int]:
        """The ledger's balance: issued = trained + dropped + in_flight."""
        return self._ledger.counts()

    def close(self) -> None:
        self._segments.close()
        self._ledger.close()

    def _usable(self, newest_token: int | None, issued: int, version: int) -> bool:
        return newest_token is not None and newest_token <= version and version - self._settings.max_lag <= issued <= version

    def _require_held(self, slot: Slot) -> None:
        held = self._slots.get(slot.group_id)
        if held is None or held.attempt != slot.attempt:
            raise ValueError(f"group {slot.group_id}, attempt {slot.attempt}: this attempt holds no slot any more")

    def _watch_failures(self, episodes: Sequence[EpisodeRow]) -> None:
        for row in episodes:
            failed = row.end_reason is EndReason.FAILED
            self._recent.append(failed)
            if failed and row.error:
                self._last_error = row.error.strip().splitlines()[-1]

    def _require_few_failures(self) -> None:
        share = sum(self._recent) / _FAILURE_WINDOW
        if share > self._settings.max_failed_share:
            raise TooManyFailures(
                f"{sum(self._recent)} of the last {len(self._recent)} episodes failed by infrastructure (allowed share "
                f"{self._settings.max_failed_share:g}); the last error: {self._last_error}"
            )
