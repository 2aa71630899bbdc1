"""Groups as Arrow record batches: one row a step, a versioned schema, no copy on the way back.

The columns are facts. Rows of an episode stand together in turn order; `end_reason`, `success` and `error` belong to
the episode and stand on its last row only. An episode that failed before its first step has no row; the ledger has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby, pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from rollout.wire.trajectory import EndReason, Group, Slot, Step, Task, Trajectory

VERSION = b"1"

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
        ("observation", pa.string()),
        ("action", pa.string()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("action_ids", pa.list_(pa.int32())),
        ("behavior_logprobs", pa.list_(pa.float32())),
        ("versions", pa.list_(pa.int32())),
        ("reward", pa.float32()),
        ("finish_reason", pa.string()),
        ("env_seconds", pa.float32()),
        ("engine_seconds", pa.float32()),
        ("end_reason", pa.string()),
        ("success", pa.bool_()),
        ("error", pa.string()),
        ("worker", pa.string()),
    ],
    metadata={b"manta.schema": VERSION},
)


class SchemaError(ValueError):
    """Rows were written by another version of the schema."""


def require_version(schema: pa.Schema, where: str) -> None:
    """Refuse rows of another schema version, in one line."""
    found = (schema.metadata or {}).get(b"manta.schema")
    if found != VERSION:
        named = "none" if found is None else found.decode()
        raise SchemaError(
            f"{where}: rows of schema version {named}, but this Manta reads version {VERSION.decode()}"
        )


def encode(group: Group) -> pa.RecordBatch:
    """One record batch of all steps of a group."""
    rows = [(trajectory, step) for trajectory in group.trajectories for step in trajectory.steps]
    owners = [trajectory for trajectory, _ in rows]
    steps = [step for _, step in rows]
    ends = _on_last_rows(group)
    slot, task, count = group.slot, group.slot.task, len(rows)
    columns: dict[str, Any] = {
        "group_id": np.full(count, slot.group_id),
        "attempt": np.full(count, slot.attempt, dtype=np.int32),
        "episode": np.asarray([owner.index for owner in owners], dtype=np.int32),
        "turn": np.asarray([step.turn for step in steps], dtype=np.int32),
        "segment": np.asarray([step.segment for step in steps], dtype=np.int32),
        "env_id": [task.env_id] * count,
        "env_options": [task.options] * count,
        "seed": np.full(count, task.seed),
        "issue_version": np.full(count, slot.version, dtype=np.int32),
        "observation": [step.observation for step in steps],
        "action": [step.action for step in steps],
        "prompt_ids": _lists([step.prompt_ids for step in steps], pa.int32()),
        "action_ids": _lists([step.action_ids for step in steps], pa.int32()),
        "behavior_logprobs": _lists([step.behavior_logprobs for step in steps], pa.float32()),
        "versions": _lists([step.versions for step in steps], pa.int32()),
        "reward": np.asarray([step.reward for step in steps], dtype=np.float32),
        "finish_reason": [step.finish_reason for step in steps],
        "env_seconds": np.asarray([step.env_seconds for step in steps], dtype=np.float32),
        "engine_seconds": np.asarray([step.engine_seconds for step in steps], dtype=np.float32),
        "end_reason": [end and end.end_reason.value for end in ends],
        "success": [end and end.success for end in ends],
        "error": [end and end.error for end in ends],
        "worker": [owner.worker for owner in owners],
    }
    arrays = [_array(columns[field.name], field.type) for field in SCHEMA]
    return pa.RecordBatch.from_arrays(arrays, schema=SCHEMA)


def decode(batch: pa.RecordBatch) -> Group:
    """The group a batch was made of; token arrays are read-only views of the batch's memory.

    Raises SchemaError for rows of another version and ValueError for a batch without rows.
    """
    require_version(batch.schema, "record batch")
    if not batch.num_rows:
        raise ValueError("a record batch without rows holds no group")
    first = {name: batch.column(name)[0].as_py() for name in ("group_id", "attempt", "issue_version")}
    task = Task(*(batch.column(name)[0].as_py() for name in ("env_id", "seed", "env_options")))
    slot = Slot(first["group_id"], first["attempt"], task, first["issue_version"])
    plain = {name: batch.column(name).to_pylist() for name in _PLAIN}
    lists = {name: _views(batch.column(name)) for name in _LISTS}
    by_episode = groupby(range(batch.num_rows), key=plain["episode"].__getitem__)
    return Group(slot, tuple(_trajectory(slot, plain, lists, list(rows)) for _, rows in by_episode))


_LISTS = ("prompt_ids", "action_ids", "behavior_logprobs", "versions")
_STEP_PLAIN = (
    "turn",
    "segment",
    "observation",
    "action",
    "reward",
    "finish_reason",
    "env_seconds",
    "engine_seconds",
)
_PLAIN = (*_STEP_PLAIN, "episode", "end_reason", "success", "error", "worker")


def _trajectory(
    slot: Slot, plain: dict[str, list[Any]], lists: dict[str, list[Any]], rows: list[int]
) -> Trajectory:
    steps = tuple(
        Step(
            **{name: plain[name][row] for name in _STEP_PLAIN}, **{name: lists[name][row] for name in _LISTS}
        )
        for row in rows
    )
    last = rows[-1]
    return Trajectory(
        group_id=slot.group_id,
        attempt=slot.attempt,
        index=plain["episode"][last],
        task=slot.task,
        steps=steps,
        end_reason=EndReason(plain["end_reason"][last]),
        success=plain["success"][last],
        error=plain["error"][last],
        worker=plain["worker"][last],
    )


def _on_last_rows(group: Group) -> list[Trajectory | None]:
    ends: list[Trajectory | None] = []
    for trajectory in group.trajectories:
        if trajectory.steps:
            ends.extend([None] * (len(trajectory.steps) - 1))
            ends.append(trajectory)
    return ends


def _array(column: Any, value_type: pa.DataType) -> pa.Array:
    return column if isinstance(column, pa.Array) else pa.array(column, type=value_type)


def _lists(arrays: Sequence[np.ndarray[Any, Any]], value_type: pa.DataType) -> pa.ListArray:
    offsets = np.zeros(len(arrays) + 1, dtype=np.int32)
    np.cumsum([len(array) for array in arrays], out=offsets[1:])
    flat = np.concatenate(arrays) if arrays else np.empty(0)
    values = pa.array(flat.astype(value_type.to_pandas_dtype(), copy=False), type=value_type)
    return pa.ListArray.from_arrays(pa.array(offsets, type=pa.int32()), values)


def _views(column: pa.ListArray) -> list[np.ndarray[Any, Any]]:
    values = column.values.to_numpy(zero_copy_only=True)
    return [values[start:end] for start, end in pairwise(column.offsets.to_pylist())]
