"""Pairs of stored episodes: what annotators of a run, finished or running, can be asked about."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

from deploy.labels.asking import Pair
from rollout.buffer.segments import scan, segment_files
from rollout.wire.schema import decode
from rollout.wire.trajectory import Group, Trajectory


class Pool:
    """The pairs of the newest groups of a run, read again when the run has stored more.

    An episode that failed by infrastructure is in no pair. Neither are two episodes that give the same answers in all
    the turns that both have.
    """

    def __init__(self, run: Path, groups: int) -> None:
        """groups: how many of the newest ones. Raises CorruptSegment and SchemaError, as does `refresh`."""
        self._folder = run / "groups"
        self._most = groups
        self._sizes: list[tuple[Path, int]] = []
        self._groups: dict[tuple[int, int], Group] = {}
        self.pairs: list[Pair] = []
        self.refresh()

    def refresh(self) -> None:
        """Read what was stored since the last call."""
        files = [path for _, path in segment_files(self._folder)]
        sizes = [(path, path.stat().st_size) for path in files]
        if sizes == self._sizes:
            return
        batches: list[Any] = []
        for path in reversed(files):
            batches = [*scan(path), *batches]
            if len(batches) >= self._most:
                break
        # A group that was issued again has rows of each attempt: the last one counts.
        newest = {group.slot.group_id: group for group in map(decode, batches[-self._most :])}
        self._groups = {(number, group.slot.attempt): group for number, group in newest.items()}
        self.pairs = [pair for group in newest.values() for pair in _pairs(group)]
        self._sizes = sizes

    def episodes(self) -> dict[tuple[int, int, int], Trajectory]:
        """The episodes of all pairs, each once, by group, attempt and place in the group."""
        keys = sorted({(*pair[:2], place) for pair in self.pairs for place in pair[2:]})
        return {key: episode for key in keys if (episode := self.episode(*key))}

    def episode(self, group_id: int, attempt: int, place: int) -> Trajectory | None:
        """An episode of the pool by its place in its group."""
        group = self._groups.get((group_id, attempt))
        return next((each for each in group.trainable if each.index == place), None) if group else None


def _pairs(group: Group) -> list[Pair]:
    slot = group.slot
    return [
        Pair(slot.group_id, slot.attempt, *sorted((one.index, other.index)))
        for one, other in combinations(group.trainable, 2)
        if any(a.action != b.action for a, b in zip(one.turns, other.turns, strict=False))
    ]
