"""What must be so of reuse, recomputed from every group's fate at every step."""

from __future__ import annotations

from rollout.buffer.samplers import Fifo, Prioritized, Uniform
from rollout.buffer.settings import ReuseSettings
from rollout.wire.trajectory import Group
from tests.rollout.buffer.store_model import Fate

SAMPLERS = (Fifo(), Uniform(), Prioritized())


class ReuseModel:
    """Beside a store's fates: which groups each step had once more."""

    def __init__(self, settings: ReuseSettings) -> None:
        self.settings = settings
        self.used: dict[int, list[int]] = {}  # by version of the step
        self.discarded: dict[int, list[int]] = {}
        self.choices: dict[tuple[object, ...], list[int]] = {}

    def count(self, group_id: int) -> int:
        """How often it was reused."""
        return sum(ids.count(group_id) for ids in self.used.values())

    def candidates(self, fates: dict[int, Fate], version: int) -> list[int]:
        """What the step after `version` may reuse, those trained longest ago first."""
        gone = {group_id for at, ids in self.discarded.items() if at <= version for group_id in ids}
        found = [
            (fate.taken_at, group_id)
            for group_id, fate in fates.items()
            if 0 <= fate.taken_at < version
            and version - fate.slot.version <= self.settings.max_lag
            and self.count(group_id) < self.settings.limit
            and group_id not in gone
        ]
        return [group_id for _, group_id in sorted(found)]

    def take(self, fates: dict[int, Fate], version: int, groups: list[Group]) -> None:
        """The step after `version` has been given these once more."""
        ids = [group.slot.group_id for group in groups]
        allowed = self.candidates(fates, version)
        assert ids == sorted(ids) and set(ids) <= set(allowed)
        assert len(ids) == len(set(ids)) == min(self.settings.groups, len(allowed))
        assert [group.reuse for group in groups] == [self.count(group_id) + 1 for group_id in ids]
        assert [group.slot for group in groups] == [fates[group_id].slot for group_id in ids]
        if self.settings.sampler == Fifo():
            assert ids == sorted(allowed[: self.settings.groups])
        # However often a step is done, after whatever deaths: of the same candidates it chooses the same.
        assert self.choices.setdefault((version, *allowed), ids) == ids
        if ids:
            self.used[version] = ids

    def discard(self, version: int) -> None:
        """No step came of it."""
        self.discarded.setdefault(version, []).extend(self.used.pop(version, []))

    def go_back(self, version: int) -> None:
        """The learner goes on from the checkpoint of `version`."""
        self.used = {at: ids for at, ids in self.used.items() if at < version}

    @property
    def rows(self) -> set[tuple[int, int, int]]:
        """What the ledger must hold: group, version, whether discarded."""
        tables = enumerate((self.used, self.discarded))
        return {
            (group_id, at, flag) for flag, table in tables for at, ids in table.items() for group_id in ids
        }
