"""Leases: which worker plays which group, which groups wait for a worker, which are to be reissued."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from rollout.wire.trajectory import Slot

ALONE_AFTER = 2  # losses of workers after which a group is suspected to cause them


@dataclass(frozen=True, slots=True)
class Lease:
    """A group that one loop of a worker plays."""

    slot: Slot
    worker: str
    worker_loop: int


class Leases:
    """Every group that was issued and is neither complete nor dropped is `playing`, `waiting` or in `reissue`.

    Groups in `waiting` keep their slot in the buffer, those in `reissue` have lost it. Both are stored with the slot of
    their last attempt; the next lease is the next attempt.

    A group that ALONE_AFTER workers were lost with is given to a worker that plays nothing else until it ends. If that
    worker is lost too, the group is the cause.
    """

    def __init__(self, evicted: set[str], losses: dict[int, int] | None = None) -> None:
        self.evicted = evicted  # workers that get no group any more
        self.losses = losses or {}  # by group: workers that were lost while they played it
        self.playing: dict[int, Lease] = {}
        self.waiting: dict[int, Slot] = {}
        self.reissue: dict[int, Slot] = {}
        self._by_loop: dict[tuple[str, int], int] = {}  # (worker, loop) -> group

    def of_loop(self, worker: str, worker_loop: int) -> Slot | None:
        """The slot that this loop of a worker holds."""
        group_id = self._by_loop.get((worker, worker_loop))
        return None if group_id is None else self.playing[group_id].slot

    def of_worker(self, worker: str) -> list[int]:
        """The groups that this worker plays."""
        return [group_id for group_id, lease in self.playing.items() if lease.worker == worker]

    def is_current(self, slot: Slot) -> bool:
        """Whether this attempt is being played."""
        lease = self.playing.get(slot.group_id)
        return lease is not None and lease.slot.attempt == slot.attempt

    def has_slot(self, group_id: int) -> bool:
        """Whether this group holds a slot in the buffer."""
        return group_id in self.playing or group_id in self.waiting

    def next_waiting(self, worker: str) -> Slot | None:
        """The first group that waits for a worker, as its next attempt; issue version, and so deadline, stay."""
        slot = self._first(self.waiting, worker)
        return None if slot is None else replace(slot, attempt=slot.attempt + 1)

    def next_reissue(self, worker: str, version: int) -> Slot | None:
        """The first group to reissue, at this version."""
        slot = self._first(self.reissue, worker)
        return None if slot is None else replace(slot, attempt=slot.attempt + 1, version=version)

    def plays_alone(self, worker: str) -> bool:
        """Whether this worker plays a suspected group, which must be its only one."""
        return any(map(self._is_suspected, self.of_worker(worker)))

    @property
    def any_alone(self) -> bool:
        """Whether some worker plays a suspected group."""
        return any(map(self._is_suspected, self.playing))

    def cause_of_loss(self, worker: str) -> Slot | None:
        """The slot of a suspected group that this worker played when it was lost, if it played that group alone."""
        groups = self.of_worker(worker)
        alone = len(groups) == 1 and self._is_suspected(groups[0])
        return self.playing[groups[0]].slot if alone else None

    def count_loss(self, group_ids: Iterable[int]) -> None:
        """The worker that played these groups was lost."""
        for group_id in group_ids:
            self.losses[group_id] = self.losses.get(group_id, 0) + 1

    def grant(self, lease: Lease) -> None:
        """A loop of a worker plays this group from now on."""
        group_id = lease.slot.group_id
        self.waiting.pop(group_id, None)
        self.reissue.pop(group_id, None)
        self.playing[group_id] = lease
        self._by_loop[lease.worker, lease.worker_loop] = group_id

    def end(self, group_ids: Iterable[int]) -> None:
        """End the leases of these groups."""
        for group_id in group_ids:
            lease = self.playing.pop(group_id)
            del self._by_loop[lease.worker, lease.worker_loop]

    def reassign(self, group_ids: Iterable[int]) -> None:
        """End the leases of these groups, which then wait for another worker."""
        for group_id in group_ids:
            slot = self.playing[group_id].slot
            self.end([group_id])
            self.waiting[group_id] = slot

    @property
    def attempts(self) -> dict[int, int]:
        """The groups that keep slot and turns, with the newest attempt of each."""
        playing = {group_id: lease.slot.attempt for group_id, lease in self.playing.items()}
        return playing | {group_id: slot.attempt for group_id, slot in self.waiting.items()}

    def _is_suspected(self, group_id: int) -> bool:
        return self.losses.get(group_id, 0) >= ALONE_AFTER

    def _first(self, slots: dict[int, Slot], worker: str) -> Slot | None:
        busy = bool(self.of_worker(worker))
        fit = (group_id for group_id in slots if not (busy and self._is_suspected(group_id)))
        first = min(fit, default=None)
        return None if first is None else slots[first]
