"""What tests do with a store over and over."""

from __future__ import annotations

from itertools import count
from pathlib import Path

import numpy as np
import pyarrow as pa

from rollout.buffer.replay_store import EpisodeRow, ReplayStore
from rollout.wire.schema import decode, encode, encode_turns
from rollout.wire.trajectory import Assignment, Group, Slot, Turn


def rows_of(group: Group) -> list[EpisodeRow]:
    return [EpisodeRow.of(trajectory) for trajectory in group.trajectories]


def commit(store: ReplayStore, group: Group) -> None:
    assert store.commit([], [(group.slot, encode(group), rows_of(group))]) == [None]


loops = count()


def assignment(store: ReplayStore) -> Assignment:
    """What a loop gets that has never asked before."""
    given = store.reserve("w", next(loops))
    assert given is not None
    return given


def reserve(store: ReplayStore) -> Slot:
    return assignment(store).slot


def turns(slot: Slot, turn: int, episode: int = 0, version: int = 0) -> pa.RecordBatch:
    ids = np.array([slot.group_id, slot.attempt, turn], dtype=np.int32)
    step = Turn(
        turn, 0, "?", "!", ids, ids, np.zeros(3, np.float32), np.full(3, version, np.int32), 0.0, "stop"
    )
    return encode_turns([(slot, episode, step, None, b"s%d" % turn)], "w")


def files_of(folder: Path) -> dict[str, bytes]:
    """Journal and segments, byte for byte."""
    found = [*(folder / "groups").iterdir(), *(folder / "turns").iterdir()]
    return {path.name: path.read_bytes() for path in found}


def group_ids(batches: list[pa.RecordBatch] | None) -> list[int]:
    return [decode(batch).slot.group_id for batch in batches or []]
