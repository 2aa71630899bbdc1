"""Groups as Arrow record batches: one row per turn, a versioned schema, zero-copy decoding.

The rows of an episode are contiguous and in turn order. `end_reason`, `success` and `error` belong to the episode and
are set on its last row only. An episode that failed before its first turn has no row; the ledger has it.

Rows of the journal have one more column; they are single finished turns of unfinished groups, in any order of groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby, pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from rollout.wire.policies import Opponent
from rollout.wire.trajectory import (
    EndReason,
    Group,
    PartialEpisode,
    Slot,
    Task,
    Trajectory,
    Turn,
    TurnEnd,
)

VERSION = b"5"
_REUSE = b"manta.reuse"  # metadata of a batch that a learner step reuses

SCHEMA = pa.schema(
    [
        ("group_id", pa.int64()),
        ("attempt", pa.int32()),
        ("episode", pa.int32()),
        ("turn", pa.int32()),
        ("segment", pa.int32()),
        ("env_id", pa.string()),
        ("env_options", pa.string()),
        ("seed", pa.int64()),
        ("issue_version", pa.int32()),
        ("policy", pa.string()),
        ("opponent", pa.string()),
        ("opponent_version", pa.int32()),
        ("observation", pa.string()),
        ("action", pa.string()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("action_ids", pa.list_(pa.int32())),
        ("behavior_logprobs", pa.list_(pa.float32())),
        ("versions", pa.list_(pa.int32())),
        ("reward", pa.float32()),
        ("seat", pa.int8()),
        ("named_rewards", pa.string()),
        ("finish_reason", pa.string()),
        ("env_seconds", pa.float32()),
        ("engine_seconds", pa.float32()),
        ("end_reason", pa.string()),
        ("success", pa.bool_()),
        ("error", pa.string()),
        ("worker", pa.string()),
        ("routed_experts", pa.large_binary()),
    ],
    metadata={b"manta.schema": VERSION},
)
# `snapshot` is the environment's state after the turn, where the environment provides one.
JOURNAL_SCHEMA = SCHEMA.append(pa.field("snapshot", pa.binary()))

TurnRow = tuple[
    Slot, int, Turn, TurnEnd | None, bytes | None
]  # episode; end, if it was the last turn; snapshot after it


class SchemaError(ValueError):
    """Rows were written by another version of the schema."""


def require_version(schema: pa.Schema, where: str) -> None:
    """Raise SchemaError, one line, for rows of another schema version."""
    found = (schema.metadata or {}).get(b"manta.schema")
    if found != VERSION:
        named = "none" if found is None else found.decode()
        raise SchemaError(
            f"{where}: rows of schema version {named}, but this Manta reads version {VERSION.decode()}; use the Manta "
            "that wrote them"
        )


def encode(group: Group) -> pa.RecordBatch:
    """Encode all turns of a group as one record batch."""
    rows = [(trajectory, turn) for trajectory in group.trajectories for turn in trajectory.turns]
    owners = [trajectory for trajectory, _ in rows]
    turns = [turn for _, turn in rows]
    ends = _on_last_rows(group)
    columns: dict[str, Any] = {
        **_slot_columns([group.slot] * len(rows)),
        "episode": np.asarray([owner.index for owner in owners], dtype=np.int32),
        "end_reason": [end and end.end_reason.value for end in ends],
        "success": [end and end.success for end in ends],
        "error": [end and end.error for end in ends],
        "worker": [owner.worker for owner in owners],
    }
    return _batch(columns | _turn_columns(turns), SCHEMA)


def encode_turns(turns: Sequence[TurnRow], worker: str) -> pa.RecordBatch:
    """Encode finished turns as one record batch of JOURNAL_SCHEMA, one row per turn."""
    ends = [end for *_, end, _ in turns]
    columns: dict[str, Any] = {
        **_slot_columns([slot for slot, *_ in turns]),
        "episode": [episode for _, episode, *_ in turns],
        "end_reason": [end and end.end_reason.value for end in ends],
        "success": [end and end.success for end in ends],
        "error": pa.nulls(len(turns), pa.string()),
        "worker": [worker] * len(turns),
        "snapshot": [snapshot for *_, snapshot in turns],
    }
    return _batch(columns | _turn_columns([turn for _, _, turn, *_ in turns]), JOURNAL_SCHEMA)


def restore_turns(rows: pa.RecordBatch) -> dict[int, PartialEpisode]:
    """Decode the played prefix of each episode of one group, by episode index; token arrays are read-only views.

    A prefix ends at the first missing turn. Where attempts overlap, rows of the later attempt replace those of the
    earlier. Raises SchemaError for rows of another version.
    """
    require_version(rows.schema, "record batch")
    plain = {name: rows.column(name).to_pylist() for name in (*_PLAIN, "attempt", "snapshot")}
    lists = _arrays(rows)
    kept: dict[int, list[int]] = {}  # by episode: its rows, one a turn
    by_turn = sorted(range(rows.num_rows), key=lambda row: (plain["attempt"][row], plain["turn"][row]))
    for row in by_turn:
        episode = kept.setdefault(plain["episode"][row], [])
        newest = plain["attempt"][episode[-1]] if episode else -1
        turn = plain["turn"][row]
        if extends_prefix(len(episode), newest, plain["attempt"][row], turn):
            episode[turn:] = [row]
    return {
        index: _partial_episode(plain, lists, episode) for index, episode in sorted(kept.items()) if episode
    }


def extends_prefix(turns: int, newest: int, attempt: int, turn: int) -> bool:
    """Whether a row extends an episode's prefix of `turns` turns, the last of them played by attempt `newest`.

    The same attempt appends at the end. A later attempt may restart at any turn of the prefix, which discards the turns
    from there on. Any other row is a repetition, or follows a gap.
    """
    return turn <= turns and (attempt > newest or (attempt == newest and turn == turns))


def decode(batch: pa.RecordBatch) -> Group:
    """Decode a group; token arrays are read-only views of the batch's memory.

    Raises SchemaError for rows of another version and ValueError for a batch without rows.
    """
    require_version(batch.schema, "record batch")
    if not batch.num_rows:
        raise ValueError("a record batch without rows holds no group")
    slot = _slot({name: batch.column(name)[0].as_py() for name in _SLOT})
    plain = {name: batch.column(name).to_pylist() for name in _PLAIN}
    lists = _arrays(batch)
    by_episode = groupby(range(batch.num_rows), key=plain["episode"].__getitem__)
    trajectories = tuple(_trajectory(slot, plain, lists, list(rows)) for _, rows in by_episode)
    return Group(slot, trajectories, int(batch.schema.metadata.get(_REUSE, 0)))


def as_reused(batch: pa.RecordBatch, reuse: int) -> pa.RecordBatch:
    """Mark a batch as the group's reuse number `reuse` (from 1), which `decode` returns in `Group.reuse`."""
    return batch.replace_schema_metadata({**batch.schema.metadata, _REUSE: b"%d" % reuse})


_SLOT = (
    "group_id", "attempt", "env_id", "env_options", "seed", "issue_version", "policy", "opponent", "opponent_version",
)  # fmt: skip
_LISTS = ("prompt_ids", "action_ids", "behavior_logprobs", "versions")
_TURN_PLAIN = (
    "turn", "segment", "observation", "action", "reward", "seat", "named_rewards", "finish_reason", "env_seconds",
    "engine_seconds",
)  # fmt: skip
_PLAIN = (*_TURN_PLAIN, "episode", "end_reason", "success", "error", "worker")


def _slot_columns(slots: Sequence[Slot]) -> dict[str, Any]:
    """The columns of `_SLOT`, a row for each of the slots."""
    return {
        "group_id": [slot.group_id for slot in slots],
        "attempt": [slot.attempt for slot in slots],
        "env_id": [slot.task.env_id for slot in slots],
        "env_options": [slot.task.options for slot in slots],
        "seed": [slot.task.seed for slot in slots],
        "issue_version": [slot.version for slot in slots],
        "policy": [slot.policy for slot in slots],
        "opponent": [slot.opponent and slot.opponent.policy for slot in slots],
        "opponent_version": [slot.opponent and slot.opponent.version for slot in slots],
    }


def _slot(row: dict[str, Any]) -> Slot:
    opponent = None if row["opponent"] is None else Opponent(row["opponent"], row["opponent_version"])
    task = Task(row["env_id"], row["seed"], row["env_options"])
    return Slot(row["group_id"], row["attempt"], task, row["issue_version"], row["policy"], opponent)


def _trajectory(
    slot: Slot, plain: dict[str, list[Any]], lists: dict[str, list[Any]], rows: list[int]
) -> Trajectory:
    last = rows[-1]
    return Trajectory(
        group_id=slot.group_id,
        attempt=slot.attempt,
        index=plain["episode"][last],
        task=slot.task,
        turns=_turns(plain, lists, rows),
        end_reason=EndReason(plain["end_reason"][last]),
        success=plain["success"][last],
        error=plain["error"][last],
        worker=plain["worker"][last],
    )


def _partial_episode(
    plain: dict[str, list[Any]], lists: dict[str, list[Any]], rows: list[int]
) -> PartialEpisode:
    reason, success = plain["end_reason"][rows[-1]], plain["success"][rows[-1]]
    end = None if reason is None else TurnEnd(EndReason(reason), success)
    return PartialEpisode(_turns(plain, lists, rows), end, plain["snapshot"][rows[-1]])


def _turns(plain: dict[str, list[Any]], lists: dict[str, list[Any]], rows: list[int]) -> tuple[Turn, ...]:
    return tuple(
        Turn(
            **{name: plain[name][row] for name in _TURN_PLAIN},
            **{name: column[row] for name, column in lists.items()},
        )
        for row in rows
    )


def _turn_columns(turns: Sequence[Turn]) -> dict[str, Any]:
    return {
        "turn": np.asarray([turn.turn for turn in turns], dtype=np.int32),
        "segment": np.asarray([turn.segment for turn in turns], dtype=np.int32),
        "observation": [turn.observation for turn in turns],
        "action": [turn.action for turn in turns],
        "prompt_ids": _lists([turn.prompt_ids for turn in turns], pa.int32()),
        "action_ids": _lists([turn.action_ids for turn in turns], pa.int32()),
        "behavior_logprobs": _lists([turn.behavior_logprobs for turn in turns], pa.float32()),
        "versions": _lists([turn.versions for turn in turns], pa.int32()),
        "reward": np.asarray([turn.reward for turn in turns], dtype=np.float32),
        "seat": [turn.seat for turn in turns],
        "named_rewards": [turn.named_rewards for turn in turns],
        "finish_reason": [turn.finish_reason for turn in turns],
        "env_seconds": np.asarray([turn.env_seconds for turn in turns], dtype=np.float32),
        "engine_seconds": np.asarray([turn.engine_seconds for turn in turns], dtype=np.float32),
        "routed_experts": _binary([turn.routed_experts for turn in turns]),
    }


def _batch(columns: dict[str, Any], schema: pa.Schema) -> pa.RecordBatch:
    arrays = [_array(columns[field.name], field.type) for field in schema]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def _on_last_rows(group: Group) -> list[Trajectory | None]:
    ends: list[Trajectory | None] = []
    for trajectory in group.trajectories:
        if trajectory.turns:
            ends.extend([None] * (len(trajectory.turns) - 1))
            ends.append(trajectory)
    return ends


def _array(column: Any, value_type: pa.DataType) -> pa.Array:
    return column if isinstance(column, pa.Array) else pa.array(column, type=value_type)


def _lists(arrays: Sequence[np.ndarray[Any, Any]], value_type: pa.DataType) -> pa.ListArray:
    offsets = np.zeros(len(arrays) + 1, dtype=np.int32)
    np.cumsum([len(array) for array in arrays], out=offsets[1:])
    # Arrow's allocator reuses memory: fresh pages would cost as much as writing to them.
    dtype, count = np.dtype(value_type.to_pandas_dtype()), int(offsets[-1])
    memory = pa.allocate_buffer(count * dtype.itemsize)
    if count:
        np.concatenate(arrays, out=np.frombuffer(memory, dtype), casting="same_kind")
    values = pa.Array.from_buffers(value_type, count, [None, memory])
    return pa.ListArray.from_arrays(pa.array(offsets, type=pa.int32()), values)


def _arrays(rows: pa.RecordBatch) -> dict[str, list[Any]]:
    """The columns of arrays, by name: read-only views, one a row."""
    arrays: dict[str, list[Any]] = {name: _views(rows.column(name)) for name in _LISTS}
    tokens = (
        len(prompt) + len(action)
        for prompt, action in zip(arrays["prompt_ids"], arrays["action_ids"], strict=True)
    )
    routed = rows.column("routed_experts")
    arrays["routed_experts"] = [
        np.frombuffer(value.as_buffer(), np.uint8).reshape(count, -1) if value.is_valid and count else None
        for value, count in zip(routed, tokens, strict=True)
    ]
    return arrays


def _binary(arrays: Sequence[np.ndarray[Any, Any] | None]) -> pa.LargeBinaryArray:
    """The bytes of arrays, one value an array; null where there is none."""
    present = [array for array in arrays if array is not None]
    if not present:
        return pa.nulls(len(arrays), pa.large_binary())
    offsets = np.zeros(len(arrays) + 1, dtype=np.int64)
    np.cumsum([0 if array is None else array.nbytes for array in arrays], out=offsets[1:])
    memory = pa.allocate_buffer(int(offsets[-1]))
    np.concatenate([array.reshape(-1) for array in present], out=np.frombuffer(memory, np.uint8))
    valid = pa.array([array is not None for array in arrays]).buffers()[1]
    return pa.LargeBinaryArray.from_buffers(
        pa.large_binary(), len(arrays), [valid, pa.py_buffer(offsets), memory]
    )


def _views(column: pa.ListArray) -> list[np.ndarray[Any, Any]]:
    values = column.values.to_numpy(zero_copy_only=True)
    return [values[start:end] for start, end in pairwise(column.offsets.to_pylist())]
