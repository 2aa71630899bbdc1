"""Who holds which group: those being played, those whose worker is gone, those to be issued anew."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from rollout.wire.trajectory import Slot

ALONE_AFTER = 2  # losses of workers that may have had another cause


@dataclass(frozen=True, slots=True)
class Held:
    """A group that one loop of a worker plays."""

    slot: Slot
    worker: str
    lane: int


class Holders:
    """Every group that was given out and is neither complete nor dropped is in exactly one of the three.

    Those of `waiting` keep their place in the buffer, those of `again` have lost it; their slots are as they were held
    last, and the next holder is the next attempt.

    A group that was held by ALONE_AFTER workers when they were lost is given to a worker that plays nothing else, which
    is given nothing else meanwhile: if that worker is lost too, the group is the cause.
    """

    def __init__(self, gone: set[str], losses: dict[int, int] | None = None) -> None:
        self.gone = gone  # workers that were given up: whatever they still ask, they are given nothing
        self.losses = losses or {}  # by group: workers that were lost while they held it
        self.playing: dict[int, Held] = {}
        self.waiting: dict[int, Slot] = {}
        self.again: dict[int, Slot] = {}
        self._lanes: dict[tuple[str, int], int] = {}  # the group of each loop that holds one

    def held_by(self, worker: str, lane: int) -> Slot | None:
        """What this loop plays."""
        group_id = self._lanes.get((worker, lane))
        return None if group_id is None else self.playing[group_id].slot

    def holds(self, slot: Slot) -> bool:
        """Whether this very attempt is being played."""
        held = self.playing.get(slot.group_id)
        return held is not None and held.slot.attempt == slot.attempt

    def keeps_place(self, group_id: int) -> bool:
        """Whether this group has a place in the buffer."""
        return group_id in self.playing or group_id in self.waiting

    def next_waiting(self, worker: str) -> Slot | None:
        """The first group whose worker is gone, as its next attempt: issue version and so deadline are kept."""
        slot = self._first(self.waiting, worker)
        return None if slot is None else replace(slot, attempt=slot.attempt + 1)

    def next_again(self, worker: str, version: int) -> Slot | None:
        """The first group to issue anew, at this version."""
        slot = self._first(self.again, worker)
        return None if slot is None else replace(slot, attempt=slot.attempt + 1, version=version)

    def plays_alone(self, worker: str) -> bool:
        """Whether this worker plays a group that is to be its only one."""
        return any(map(self._is_for_one_alone, self.of(worker)))

    @property
    def any_alone(self) -> bool:
        """Whether some worker plays a group that is to be its only one."""
        return any(map(self._is_for_one_alone, self.playing))

    def cause_of_loss(self, worker: str) -> Slot | None:
        """The group that a worker was lost with, where it was to be the only one there."""
        held = self.of(worker)
        alone = len(held) == 1 and self._is_for_one_alone(held[0])
        return self.playing[held[0]].slot if alone else None

    def count_loss(self, group_ids: Iterable[int]) -> None:
        """The worker that held these was lost."""
        for group_id in group_ids:
            self.losses[group_id] = self.losses.get(group_id, 0) + 1

    def _is_for_one_alone(self, group_id: int) -> bool:
        return self.losses.get(group_id, 0) >= ALONE_AFTER

    def _first(self, slots: dict[int, Slot], worker: str) -> Slot | None:
        busy = bool(self.of(worker))
        fit = (group_id for group_id in slots if not (busy and self._is_for_one_alone(group_id)))
        first = min(fit, default=None)
        return None if first is None else slots[first]

    def hold(self, held: Held) -> None:
        group_id = held.slot.group_id
        self.waiting.pop(group_id, None)
        self.again.pop(group_id, None)
        self.playing[group_id] = held
        self._lanes[held.worker, held.lane] = group_id

    def let_go(self, group_ids: Iterable[int]) -> None:
        """These are played no more."""
        for group_id in group_ids:
            held = self.playing.pop(group_id)
            del self._lanes[held.worker, held.lane]

    def of(self, worker: str) -> list[int]:
        """What this worker plays."""
        return [group_id for group_id, held in self.playing.items() if held.worker == worker]

    def reassign(self, group_ids: Iterable[int]) -> None:
        """These wait for another worker."""
        for group_id in group_ids:
            slot = self.playing[group_id].slot
            self.let_go([group_id])
            self.waiting[group_id] = slot

    @property
    def attempts(self) -> dict[int, int]:
        """The groups that keep their place and their turns, with the newest attempt of each."""
        playing = {group_id: held.slot.attempt for group_id, held in self.playing.items()}
        return playing | {group_id: slot.attempt for group_id, slot in self.waiting.items()}
