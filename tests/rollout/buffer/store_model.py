"""What must be so of a store, as a dictionary of fates; and a disk that can lose what was not synced."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa
from hypothesis import strategies as st

from rollout.wire.schema import encode_turns
from rollout.wire.trajectory import EndReason, Group, Slot, Task, Trajectory, Turn

T = TypeVar("T")

GROUPS_PER_STEP = 2
WORKERS = ("a", "b")


def task_of(group_id: int) -> Task:
    return Task.of("count", 1000 + group_id)


def step(slot: Slot, episode: int, turn: int, version: int) -> Turn:
    """A turn whose tokens say whose they are."""
    tokens = np.array([slot.group_id, slot.attempt, episode, turn], dtype=np.int32)
    by = np.full(4, version, dtype=np.int32)
    return Turn(turn, 0, "?", "!", tokens, tokens, np.full(4, -1, np.float32), by, 1.0, "stop")


def played(slot: Slot, versions: tuple[int, int]) -> Group:
    """Two siblings of one step, sampled by these two versions."""
    return Group(
        slot,
        tuple(
            Trajectory(
                slot.group_id,
                slot.attempt,
                index,
                slot.task,
                (step(slot, index, 0, version),),
                EndReason.TERMINATED,
            )
            for index, version in enumerate(versions)
        ),
    )


class Died(BaseException):
    """The process was killed here."""


class Disk:
    """Stands in for fsync: knows what is durable of each file, and can kill whoever waits for it."""

    def __init__(self) -> None:
        self.durable: dict[str, int] = {}
        self.kill_in: int | None = None  # syncs until the process dies

    def fsync(self, descriptor: int) -> None:
        if self.kill_in is not None:
            self.kill_in -= 1
            if self.kill_in < 0:
                self.kill_in = None
                raise Died
        name = os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))
        self.durable[name] = os.fstat(descriptor).st_size

    def lose(self, data: st.DataObject, folder: Path, log_size: int) -> None:
        """What a death of the machine leaves: of what was not synced, as much as chance will have it."""
        for path in [*(folder / "turns").iterdir(), *(folder / "groups").iterdir()]:
            size, durable = path.stat().st_size, self.durable.get(path.name, 0)
            os.truncate(path, data.draw(st.integers(min(durable, size), size)))
        log = folder / "ledger.sqlite-wal"
        size = log.stat().st_size
        if size > log_size:
            os.truncate(log, data.draw(st.integers(log_size, size)))


@dataclass
class Fate:
    """What the model knows of one group."""

    slot: Slot
    holder: tuple[str, int] | None
    state: str = "issued"
    sampled_by: int = -1
    taken_at: int = -1
    turns: dict[int, list[tuple[int, int]]] = field(default_factory=dict)  # by episode: attempt and version

    @property
    def tokens(self) -> dict[int, list[list[int]]]:
        """What an assignment holds of it."""
        return {
            episode: [[self.slot.group_id, attempt, episode, turn] for turn, (attempt, _) in enumerate(turns)]
            for episode, turns in self.turns.items()
            if turns
        }

    def go_back(self, version: int, max_lag: int) -> None:
        """The learner goes on from the checkpoint of `version`."""
        on_time = version - max_lag <= self.slot.version <= version
        if self.state == "complete" or self.taken_at >= version:
            self.state = "complete" if on_time and self.sampled_by <= version else "again"
            self.taken_at = -1
        elif self.state == "taken":
            self.state = "trained"
        elif self.state in ("issued", "waiting"):
            self.state = "waiting" if on_time else "again"
            for turns in self.turns.values():
                late = [turn for turn, (_, by) in enumerate(turns) if by > version]
                del turns[min(late, default=len(turns)) :]
        if self.state == "again":
            self.turns = {}


def ids(fates: dict[int, Fate], *states: str) -> list[int]:
    return sorted(group_id for group_id, fate in fates.items() if fate.state in states)


def next_slot(fates: dict[int, Fate], worker: str, worker_loop: int, version: int, free: bool) -> Slot | None:
    """What `reserve` must give."""
    for group_id in ids(fates, "issued"):
        fate = fates[group_id]
        if fate.holder == (worker, worker_loop):
            heard = any(attempt == fate.slot.attempt for turns in fate.turns.values() for attempt, _ in turns)
            return replace(fate.slot, attempt=fate.slot.attempt + heard)
    if waiting := ids(fates, "waiting"):
        slot = fates[waiting[0]].slot
        return replace(slot, attempt=slot.attempt + 1)
    if not free:
        return None
    if again := ids(fates, "again"):
        slot = fates[again[0]].slot
        return replace(slot, attempt=slot.attempt + 1, version=version)
    return Slot(len(fates), 0, task_of(len(fates)), version)


def some_turns(
    data: st.DataObject, fates: dict[int, Fate], now: int
) -> tuple[list[pa.RecordBatch], list[tuple[int, int, int, int]]]:
    """Turns of groups that are held, of ones that are not, and repetitions; and what the model makes of them.

    now: the version that engines hold.
    """
    rows, meant = [], []
    held_ones = ids(fates, "issued")
    likely = held_ones if held_ones and data.draw(st.integers(0, 3)) else sorted(fates)
    for group_id in data.draw(st.lists(st.sampled_from(likely), min_size=1, max_size=3, unique=True)):
        fate = fates[group_id]
        held = fate.state == "issued"
        slot = fate.slot if held or not fate.slot.attempt else replace(fate.slot, attempt=0)
        episode = data.draw(st.integers(0, 1))
        turns = fate.turns.get(episode, [])
        # An episode goes on, or an attempt that has not played of it begins it anew.
        anew = all(attempt < slot.attempt for attempt, _ in turns) and data.draw(st.booleans())
        turn = 0 if anew else len(turns)
        version = data.draw(st.sampled_from([now, min(slot.version, now)]))
        if held:
            meant.append((group_id, episode, turn, version))
        state = b"%d after %d" % (episode, turn + 1)
        row = (slot, episode, step(slot, episode, turn, version), None, state)
        rows += [row] * data.draw(st.integers(1, 2))
        if turn and data.draw(st.booleans()):
            # A repetition of what is known already.
            attempt, version = turns[0]
            of = replace(slot, attempt=attempt)
            rows.append((of, episode, step(of, episode, 0, version), None, b"%d after 1" % episode))
    return ([encode_turns(rows, "w")] if rows else []), meant


def stale_slot(data: st.DataObject, fate: Fate) -> Slot:
    """A slot of this group that nobody holds."""
    if fate.state == "issued":
        return replace(fate.slot, attempt=fate.slot.attempt + data.draw(st.sampled_from([-1, 1])))
    if fate.state in ("waiting", "again"):
        return fate.slot
    return replace(fate.slot, attempt=fate.slot.attempt - 1)
