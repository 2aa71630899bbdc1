"""Bounded staleness: which groups may start, which are ready, which a step takes. No clock, disk or payload format.

There are (S+1)*P slots for P groups a step and a maximum lag of S versions. A slot is held from `reserve` until the
engines hold the weights of the step that took its group, or until the group is dropped. A group issued at version a
must be taken at version a+S at the latest; that is its deadline. The learner may take one step ahead of the engines:
it learns at version v+1 while they, who hold v, are brought there; the slots of both steps are then held.

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
        self._taken: dict[
            int, dict[int, _Waiting[Payload]]
        ] = {}  # by the version that the learner took them at

    @property
    def capacity(self) -> int:
        return (self.max_lag + 1) * self.groups_per_step

    @property
    def outstanding(self) -> int:
        """Slots held: by groups that wait for completion or for a step, and by groups taken but not released."""
        return len(self._waiting) + self.in_steps

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
    def in_steps(self) -> int:
        """Groups of steps not yet released."""
        return sum(map(len, self._taken.values()))

    def taken(self, version: int) -> list[tuple[int, Payload]]:
        """The groups of the step after `version`, in order of group id; empty once released."""
        return [
            (group_id, _payload(entry)) for group_id, entry in sorted(self._taken.get(version, {}).items())
        ]

    def may_take(self, version: int) -> bool:
        """Whether the step after `version` is the next to be released, or follows that one."""
        return version == self.version or (version == self.version + 1 and self.version in self._taken)

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
        self, group_id: int, issue_version: int, payload: Payload | None, taken: int | None = None
    ) -> None:
        """Hold a slot that an earlier process issued, without checks. taken: at which version; None: it waits."""
        self._require_new(group_id)
        held = self._waiting if taken is None else self._taken.setdefault(taken, {})
        held[group_id] = _Waiting(issue_version + self.max_lag, payload)

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

    def choose(self, version: int) -> list[tuple[int, Payload]] | None:
        """Return the P groups of the step after `version` in order of group id, or None while they are not ready."""
        if version in self._taken or not self.may_take(version):
            return None
        ready = sorted((self._waiting[group_id].deadline, group_id) for group_id in self.completed)
        if len(ready) < self.groups_per_step:
            return None
        # Taking the earliest deadlines leaves the fewest urgent groups: if this choice is not feasible, none is.
        chosen = {group_id for _, group_id in ready[: self.groups_per_step]}
        left = [entry.deadline for group_id, entry in self._waiting.items() if group_id not in chosen]
        if not self._can_be_met(left, first_step=version + 1):
            return None
        return [(group_id, _payload(self._waiting[group_id])) for group_id in sorted(chosen)]

    def take(self, version: int) -> list[tuple[int, Payload]] | None:
        """Take the groups that `choose` returns."""
        chosen = self.choose(version)
        if chosen is not None:
            self._taken[version] = {group_id: self._waiting.pop(group_id) for group_id, _ in chosen}
        return chosen

    def give_back(self, version: int) -> None:
        """Make the groups of the step after `version` ready again: it has not received them."""
        self._waiting.update(self._taken.pop(version, {}))

    def discard(self, version: int) -> None:
        """Free the slots of groups that the step after `version` cannot train on; the same step takes others."""
        self._taken.pop(version, None)

    def release(self, version: int) -> None:
        """Engines hold `version`, the result of the step before: free the slots of its groups."""
        if self.version not in self._taken or version != self.version + 1:
            raise ValueError(
                f"release({version}) does not follow: engines held version {self.version} and "
                f"{len(self._taken.get(self.version, ()))} groups were taken for the next one"
            )
        del self._taken[self.version]
        self.version = version

    def _require_new(self, group_id: int) -> None:
        if group_id in self._waiting or any(group_id in step for step in self._taken.values()):
            raise ValueError(f"group {group_id} already holds a slot")

    def _can_be_met(self, deadlines: list[int], first_step: int) -> bool:
        # Steps first_step, first_step + 1, ... take P groups each, so the i-th most urgent is taken in the i // P-th.
        steps = (first_step + position // self.groups_per_step for position in range(len(deadlines)))
        return all(step <= deadline for step, deadline in zip(steps, sorted(deadlines), strict=True))


def _payload(entry: _Waiting[Payload]) -> Payload:
    assert entry.payload is not None
    return entry.payload
