"""Small groups to store, made by hand."""

from __future__ import annotations

import numpy as np

from rollout.wire.trajectory import EndReason, Group, Slot, Task, Trajectory, Turn


def task_of(group_id: int) -> Task:
    return Task.of("count", 1000 + group_id)


def make_group(
    slot: Slot,
    versions: int | None = None,
    end_reasons: tuple[EndReason, ...] = (EndReason.TERMINATED, EndReason.TRUNCATED),
    tokens: int = 3,
) -> Group:
    """A sibling for each end reason, of one step each; `versions` sampled all tokens (default: the slot's)."""
    sampled = np.full(tokens, slot.version if versions is None else versions, dtype=np.int32)
    step = Turn(
        turn=0,
        segment=0,
        observation="north?",
        action="yes",
        prompt_ids=np.arange(5, dtype=np.int32),
        action_ids=np.arange(tokens, dtype=np.int32) + slot.group_id,
        behavior_logprobs=np.full(tokens, -0.5, dtype=np.float32),
        versions=sampled,
        reward=0.5,
        finish_reason="stop",
    )
    siblings = tuple(
        Trajectory(slot.group_id, slot.attempt, index, slot.task, (step,), reason, worker="w0")
        for index, reason in enumerate(end_reasons)
    )
    return Group(slot, siblings)
