"""Small run folders with groups of episodes of two turns, whose second message and answers a test chooses."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rollout.buffer.segments import SegmentWriter
from rollout.wire.schema import encode
from rollout.wire.trajectory import EndReason, Group, Slot, Task, Trajectory, Turn

OPENING: list[dict[str, Any]] = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "2 + 2?"},
]


def turn(number: int, observation: str, action: str) -> Turn:
    ids = np.array([1, 2], np.int32)
    logprobs = np.zeros(2, np.float32)
    return Turn(number, 0, observation, action, ids, ids, logprobs, ids, 0.0, "stop")


def group(
    group_id: int,
    answers: Sequence[Sequence[str]],
    reasons: Sequence[EndReason] = (),
    attempt: int = 0,
    opening: Sequence[dict[str, Any]] = OPENING,
) -> Group:
    """An episode for each list of answers, one answer a turn; after the first turn the user says "sure?"."""
    task = Task.of("sums", group_id)
    ends = [*reasons, *[EndReason.TERMINATED] * (len(answers) - len(reasons))]
    return Group(
        Slot(group_id, attempt, task, 0),
        tuple(
            Trajectory(
                group_id,
                attempt,
                place,
                task,
                tuple(
                    turn(number, "sure?" if number else json.dumps(list(opening)), answer)
                    for number, answer in enumerate(said)
                ),
                ends[place],
            )
            for place, said in enumerate(answers)
        ),
    )


def stored(run: Path, *groups: Group) -> Path:
    """A folder with these groups, added to those that it has."""
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.json").write_text("{}", encoding="utf-8")
    writer = SegmentWriter(run / "groups", max_bytes=1 << 20)
    for each in groups:
        writer.append(encode(each))
    writer.close()
    return run
