"""The store: replay buffer, ledger and segments as one thing that survives a crash at any point.

Order matters and is always the same: the payload is synced before the ledger says complete, and nobody is handed a slot
or a batch before the ledger has it. Memory holds what is outstanding only. One writer, not thread-safe.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field

from rollout.wire.ledger import EpisodeRow, Ledger, StoredGroup
from rollout.wire.replay import ReplayBuffer
from rollout.wire.segments import Location, SegmentWriter, read_batch
from rollout.wire.trajectory import DropReason, EndReason, Slot, Task

__all__ = ["BufferSettings", "EpisodeRow", "Finished", "Store", "TooManyFailures"]

Finished = tuple[Slot, pa.RecordBatch, Location, Sequence[EpisodeRow]]  # a group whose rows are appended

_FAILURE_WINDOW = 200  # episodes over which the share of infrastructure failures is judged


class BufferSettings(BaseModel):
    """How many groups a step takes and how old they may be."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    groups_per_step: int = Field(32, gt=0, description="groups of one learner step")
    max_lag: int = Field(
        1, ge=0, description="weight versions a group may be behind when trained; 0: synchronous"
    )
    segment_mib: int = Field(
        64, gt=0, description="size at which a segment file of stored rows is closed, MiB"
    )
    max_failed_share: float = Field(
        0.2,
        ge=0,
        le=1,
        description="share of the last 200 episodes that infrastructure may fail before the run stops",
    )


class TooManyFailures(RuntimeError):
    """Environments or engines fail so often that training on the rest would be training on a biased rest."""


class Store:
    """Everything sampled and not yet trained, on disk and in memory.

    `total_steps` bounds what is given out: reserve() answers None for good once the groups of all steps are covered.
    A folder that holds unfinished groups of an earlier process wants `recover` before anything else.
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
        self._unrecovered = len(self._ledger.unfinished())
        self._again: deque[tuple[int, int, Task]] = deque()  # (group id, attempt, task), in order of group id
        self._playing: dict[int, Slot] = {}  # given out, neither handed in nor dropped
        self._recent: deque[bool] = deque(maxlen=_FAILURE_WINDOW)  # True: failed
        self._last_error = "none recorded"

    @property
    def settings(self) -> BufferSettings:
        return self._settings

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

    @property
    def outstanding(self) -> int:
        """Slots held: by groups being played, complete groups, and groups of a step not yet released."""
        return self._buffer.outstanding

    def reserve(self, worker: str) -> Slot | None:
        """The next group for a worker, or None while no slot is free (or, see `covered`, none will ever be).

        Groups to issue again come first, in order of group id. Raises ValueError where `recover` is due.
        """
        if self._unrecovered:
            raise ValueError(
                f"{self._folder} holds {self._unrecovered} unfinished groups of an earlier process: recover() first"
            )
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
        self._playing[group_id] = slot
        return slot

    def append(self, slot: Slot, batch: pa.RecordBatch) -> Location:
        """Write a finished group's rows; `commit` makes them count. ValueError: the slot is not held (any more)."""
        self._require_held(slot)
        location = self._segments.append(batch)
        del self._playing[slot.group_id]
        return location

    def sync(self) -> None:
        """Make all appended rows durable. May run in another thread while nothing is appended."""
        self._segments.sync()

    def commit(self, finished: Sequence[Finished]) -> None:
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

    def drop(
        self, slot: Slot, reason: DropReason, error: str = "", episodes: Sequence[EpisodeRow] = ()
    ) -> None:
        """Give a group up; its slot is free at once. ValueError: the slot is not held (any more)."""
        self._require_held(slot)
        self._ledger.drop(slot, reason, error, episodes)
        self._buffer.drop(slot.group_id)
        del self._playing[slot.group_id]
        self._remember_error(error)
        self._watch_failures(episodes)

    def take(self) -> list[pa.RecordBatch] | None:
        """The next step's groups in order of group id, or None while they are not ready."""
        self._require_few_failures()
        taken = self._buffer.take()
        if taken is None:
            return None
        # Should this fail, the run ends, and a resumed one finds the groups complete.
        self._ledger.take([group_id for group_id, _ in taken], self._buffer.version)
        return [batch for _, batch in taken]

    def release(self, version: int) -> None:
        """Engines hold `version`: the slots of the groups it was trained on are free."""
        self._buffer.release(version)

    def landed(self, version: int) -> None:
        """A checkpoint of `version` is on disk."""
        self._ledger.landed(version)

    def recover(self, version: int) -> None:
        """Go on from the checkpoint of `version`; called once, before anything is reserved.

        Groups the checkpoint does not contain are complete again when the weights that sampled them are ones this run
        still has and they can still meet the lag bound; all others are issued anew, same group id and task, next
        attempt, in order.
        """
        if self._buffer.outstanding or self._again:
            raise ValueError("recover() must come before anything is reserved")
        self._ledger.landed(version)  # the crash may have come between the checkpoint and its record
        self._buffer = ReplayBuffer(self._settings.groups_per_step, self._settings.max_lag, version)
        complete = []
        for stored in self._ledger.unfinished():
            slot = stored.slot
            # The buffer refuses what does not fit, which happens where a resumed run has smaller settings.
            if self._usable(stored) and self._buffer.reserve(slot.group_id, issue_version=slot.version):
                assert stored.location is not None
                self._buffer.add(slot.group_id, read_batch(self._groups, stored.location))
                complete.append(slot.group_id)
            else:
                self._again.append((slot.group_id, slot.attempt + 1, slot.task))
        self._ledger.recover(complete, [group_id for group_id, _, _ in self._again])
        self._unrecovered = 0

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

    def _usable(self, stored: StoredGroup) -> bool:
        if stored.location is None or stored.max_version is None:
            return False
        issued, version = stored.slot.version, self._buffer.version
        return stored.max_version <= version and version - self._settings.max_lag <= issued <= version

    def _require_held(self, slot: Slot) -> None:
        held = self._playing.get(slot.group_id)
        if held is None or held.attempt != slot.attempt:
            raise ValueError(
                f"group {slot.group_id}, attempt {slot.attempt}, holds no slot: "
                "it was handed in, dropped or issued again"
            )

    def _watch_failures(self, episodes: Sequence[EpisodeRow]) -> None:
        for row in episodes:
            failed = row.end_reason is EndReason.FAILED
            self._recent.append(failed)
            if failed:
                self._remember_error(row.error or "")

    def _remember_error(self, error: str) -> None:
        if lines := error.strip().splitlines():
            self._last_error = lines[-1]

    def _require_few_failures(self) -> None:
        # A share of the whole window, so that a bad start of a few episodes does not end a run.
        failed, allowed = sum(self._recent), self._settings.max_failed_share
        if failed > allowed * _FAILURE_WINDOW:
            raise TooManyFailures(
                f"{failed} of the last {len(self._recent)} episodes failed by infrastructure, more than {allowed:.0%} "
                f"of {_FAILURE_WINDOW} (max_failed_share); the last error: {self._last_error}"
            )
