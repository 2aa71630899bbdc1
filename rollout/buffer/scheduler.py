"""Bounded staleness: which groups may start, which are ready, which a step takes. No clock, disk or payload format.

There are (S+1)*P slots for P groups a step and a maximum lag of S versions. A slot is held from `reserve` until the
engines hold the weights of the step that took its group, or until the group is dropped. A group issued at version a
must be taken at version a+S at the latest; that is its deadline.

`take` therefore prefers complete groups, oldest first, but leaves no group behind that could miss its deadline: after
it, for every j >= 1, at most j*P waiting groups may have a deadline within the next j steps. The number of slots makes
that possible at all times: at most (S+1)*P groups wait, P for each deadline. With S = 0 the deadline of every group is
the next step, which takes exactly the P groups issued for it, in order of issue: the synchronous trainer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

Payload = TypeVar("Payload")


@dataclass(slots=True)
class _Waiting(Generic[Payload]):
    deadline: int
    payload: Payload | None = None


class StalenessScheduler(Generic[Payload]):
    """Slots of groups: reserve, add, take, release. Deterministic: the result depends on the order of calls only."""

    def __init__(self, groups_per_step: int, max_lag: int, version: int = 0) -> None:
        if groups_per_step < 1 or max_lag < 0:
            raise ValueError(f"groups_per_step={groups_per_step} must be >= 1, and max_lag={max_lag} >= 0")
        self.version = version
        self.groups_per_step = groups_per_step
        self.max_lag = max_lag
        self._waiting: dict[int, _Waiting[Payload]] = {}
        self._taken: dict[int, _Waiting[Payload]] = {}

    @property
    def capacity(self) -> int:
        return (self.max_lag + 1) * self.groups_per_step

    @property
    def outstanding(self) -> int:
        """Slots held: by groups that wait for completion or for a step, and by groups taken but not released."""
        return len(self._waiting) + len(self._taken)

    @property
    def complete(self) -> int:
        """Groups that are ready and not yet taken."""
        return sum(entry.payload is not None for entry in self._waiting.values())

    @property
    def completed(self) -> dict[int, Payload]:
        """The groups that are ready and not yet taken."""
        return {
            group_id: entry.payload for group_id, entry in self._waiting.items() if entry.payload is not None
        }

    @property
    def taken(self) -> list[tuple[int, Payload]]:
        """The groups of the step not yet released, in order of group id."""
        return [(group_id, _payload(entry)) for group_id, entry in sorted(self._taken.items())]

    def reserve(self, group_id: int, issue_version: int | None = None) -> bool:
        """Hold a slot for a new group; False if none is free.

        issue_version: of an older group, in a rollback; it gets a slot only if all can still meet their deadlines.
        """
        self._require_new(group_id)
        if self.outstanding >= self.capacity:
            return False
        deadline = (self.version if issue_version is None else issue_version) + self.max_lag
        if issue_version is not None:
            waiting = [entry.deadline for entry in self._waiting.values()]
            if not self._can_be_met([*waiting, deadline], first_step=self.version):
                return False
        self._waiting[group_id] = _Waiting(deadline)
        return True

    def restore(
        self, group_id: int, issue_version: int, payload: Payload | None, taken: bool = False
    ) -> None:
        """Hold a slot that an earlier process issued, waiting or taken, without checks."""
        self._require_new(group_id)
        (self._taken if taken else self._waiting)[group_id] = _Waiting(issue_version + self.max_lag, payload)

    def add(self, group_id: int, payload: Payload) -> None:
        """Mark a group as complete."""
        entry = self._waiting.get(group_id)
        if entry is None or entry.payload is not None:
            raise ValueError(f"group {group_id} is not waiting for its payload")
        entry.payload = payload

    def drop(self, group_id: int) -> None:
        """Free the slot of a group that will never be taken."""
        if self._waiting.pop(group_id, None) is None:
            raise ValueError(f"group {group_id} holds no slot that can be dropped")

    def choose(self) -> list[tuple[int, Payload]] | None:
        """Return the next step's P groups in order of group id, or None while they are not ready."""
        if self._taken:
            return None  # the last step has not been released
        ready = sorted((self._waiting[group_id].deadline, group_id) for group_id in self.completed)
        if len(ready) < self.groups_per_step:
            return None
        # Taking the earliest deadlines leaves the fewest urgent groups: if this choice is not feasible, none is.
        chosen = {group_id for _, group_id in ready[: self.groups_per_step]}
        left = [entry.deadline for group_id, entry in self._waiting.items() if group_id not in chosen]
        if not self._can_be_met(left, first_step=self.version + 1):
            return None
        return [(group_id, _payload(self._waiting[group_id])) for group_id in sorted(chosen)]

    def take(self) -> list[tuple[int, Payload]] | None:
        """Take the groups that `choose` returns."""
        chosen = self.choose()
        for group_id, _ in chosen or ():
            self._taken[group_id] = self._waiting.pop(group_id)
        return chosen

    def give_back(self) -> None:
        """Make taken groups ready again: the step has not received them."""
        self._waiting.update(self._taken)
        self._taken.clear()

    def discard(self) -> None:
        """Free the slots of taken groups that the step cannot train on; the same step takes other groups."""
        self._taken.clear()

    def release(self, version: int) -> None:
        """Engines hold `version`, the result of the last step taken: free the slots of its groups."""
        if not self._taken or version != self.version + 1:
            raise ValueError(
                f"release({version}) does not follow: engines held version {self.version} and "
                f"{len(self._taken)} groups were taken for the next one"
            )
        self.version = version
        self._taken.clear()

    def _require_new(self, group_id: int) -> None:
        if group_id in self._waiting or group_id in self._taken:
            raise ValueError(f"group {group_id} already holds a slot")

    def _can_be_met(self, deadlines: list[int], first_step: int) -> bool:
        # Steps first_step, first_step + 1, ... take P groups each, so the i-th most urgent is taken in the i // P-th.
        steps = (first_step + position // self.groups_per_step for position in range(len(deadlines)))
        return all(step <= deadline for step, deadline in zip(steps, sorted(deadlines), strict=True))


def _payload(entry: _Waiting[Payload]) -> Payload:
    assert entry.payload is not None
    return entry.payload
