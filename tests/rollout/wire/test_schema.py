"""What is stored comes back: every field, every token, without a copy."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import fields

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from rollout.wire.policies import Opponent
from rollout.wire.schema import SCHEMA, SchemaError, decode, encode
from rollout.wire.trajectory import EndReason, Group, Slot, Task, Trajectory, Turn

texts = st.text(st.characters(codec="utf-8"), max_size=8)
int32s = st.integers(-(2**31), 2**31 - 1)
float32s = st.floats(width=32, allow_nan=False)
counts = st.integers(0, 2**31 - 1)


def int32_arrays(length: st.SearchStrategy[int] | int) -> st.SearchStrategy[np.ndarray]:
    return arrays(np.int32, length, elements=int32s)


@st.composite
def steps(draw: st.DrawFn) -> Turn:
    sampled = draw(st.integers(0, 4))
    prompt_ids = draw(int32_arrays(st.integers(0, 4)))
    tokens = len(prompt_ids) + sampled
    routed = arrays(np.uint8, (tokens, draw(st.integers(1, 3)))) if tokens else st.none()
    return Turn(
        turn=draw(counts),
        segment=draw(counts),
        observation=draw(texts),
        action=draw(texts),
        prompt_ids=prompt_ids,
        action_ids=draw(int32_arrays(sampled)),
        behavior_logprobs=draw(arrays(np.float32, sampled, elements=float32s)),
        versions=draw(int32_arrays(sampled)),
        reward=draw(float32s),
        finish_reason=draw(st.sampled_from(["stop", "length"])),
        seat=draw(st.sampled_from([None, 0, 1])),
        named_rewards=draw(st.none() | texts),
        env_seconds=draw(float32s),
        engine_seconds=draw(float32s),
        routed_experts=draw(st.none() | routed),
    )


@st.composite
def groups(draw: st.DrawFn) -> Group:
    task = Task(draw(texts), draw(st.integers(-(2**63), 2**63 - 1)), draw(texts))
    opponent = draw(st.none() | st.builds(Opponent, texts, counts))
    slot = Slot(draw(st.integers(0, 2**62)), draw(counts), task, draw(counts), draw(texts), opponent)
    siblings = [
        Trajectory(
            slot.group_id,
            slot.attempt,
            index,
            task,
            tuple(draw(st.lists(steps(), max_size=3))),
            draw(st.sampled_from(EndReason)),
            draw(st.sampled_from([None, True, False])),
            draw(st.none() | texts),
            draw(texts),
        )
        for index in range(draw(st.integers(1, 3)))
    ]
    return Group(slot, tuple(siblings))


def plain(value: object) -> object:
    """Values that compare with ==, arrays with their type and their bits."""
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, value.tobytes()
    if isinstance(value, tuple):
        return tuple(map(plain, value))
    if isinstance(value, Group | Trajectory | Turn):
        return tuple((field.name, plain(getattr(value, field.name))) for field in fields(value))
    return value


@settings(max_examples=60)
@given(groups(), st.booleans())
def test_a_group_comes_back_as_it_was(group: Group, through_a_pickle: bool) -> None:
    with_rows = Group(group.slot, tuple(t for t in group.trajectories if t.turns))
    batch = encode(group)
    batch.validate(full=True)
    assert batch.schema.equals(SCHEMA, check_metadata=True)
    assert batch.num_rows == sum(len(trajectory.turns) for trajectory in group.trajectories)
    if not with_rows.trajectories:
        with pytest.raises(ValueError, match="holds no group"):
            decode(batch)
        return
    batch = pickle.loads(pickle.dumps(batch)) if through_a_pickle else batch
    assert plain(decode(batch)) == plain(with_rows)


def test_token_arrays_are_views_that_nobody_can_write_to(group_of: Callable[..., Group]) -> None:
    batch = encode(group_of(Slot(4, 0, Task.of("count", 1), 0)))
    for name in ("prompt_ids", "action_ids", "behavior_logprobs", "versions"):
        memory = batch.column(name).values.to_numpy()
        for trajectory in decode(batch).trajectories:
            array = getattr(trajectory.turns[0], name)
            assert np.shares_memory(array, memory)
            with pytest.raises(ValueError, match="read-only"):
                array[0] = 0


def test_one_row_of_many_groups_is_found_where_it_lies(group_of: Callable[..., Group]) -> None:
    given_groups = [
        group_of(Slot(index, 0, Task.of("count", index), 0), tokens=index + 1) for index in range(3)
    ]
    together = (
        pa.Table.from_batches([encode(group) for group in given_groups]).combine_chunks().to_batches()[0]
    )
    assert plain(decode(together.slice(2, 2))) == plain(given_groups[1])


def test_what_belongs_to_the_episode_stands_on_its_last_row_only(group_of: Callable[..., Group]) -> None:
    (first, second) = group_of(Slot(4, 0, Task.of("count", 1), 0)).trajectories
    long = Trajectory(4, 0, 0, first.task, first.turns * 3, EndReason.FAILED, False, "lost", "w")
    batch = encode(Group(Slot(4, 0, first.task, 0), (long, second)))
    assert batch.column("end_reason").to_pylist() == [None, None, "failed", "truncated"]
    assert batch.column("success").to_pylist() == [None, None, False, None]
    assert batch.column("error").to_pylist() == [None, None, "lost", None]


@pytest.mark.parametrize("metadata", [None, {b"manta.schema": b"1"}])
def test_rows_of_another_version_are_refused_in_one_line(
    group_of: Callable[..., Group], metadata: dict[bytes, bytes] | None
) -> None:
    batch = encode(group_of(Slot(4, 0, Task.of("count", 1), 0))).replace_schema_metadata(metadata)
    with pytest.raises(SchemaError, match="reads version 5") as raised:
        decode(batch)
    assert "\n" not in str(raised.value)
