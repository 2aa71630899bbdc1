"""Resume an episode from its durable turns: the environment's state after the last of them is restored.

with snapshots            restored from the snapshot of the last turn
nondeterministic          cannot be restored: the episode starts again
any other                 reset with the task's seed, and the stored actions are replayed; observations and rewards
                          must equal the stored ones
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from envs.base import Info, Observation, earlier_end, messages_of
from envs.hosting.host import EnvironmentFailed, Replica, TokenUsage
from rollout.chat.chat import as_json
from rollout.episodes.pool import environment_call
from rollout.wire.equality import all_equal
from rollout.wire.trajectory import PartialEpisode, Task, Turn

_LENGTH = struct.Struct("<I")  # of the JSON before the environment's own bytes


class Restart(StrEnum):
    """Why an episode starts again although it has durable turns."""

    NONDETERMINISTIC = "nondeterministic"  # its environment may not repeat itself, and has no snapshot
    DIVERGED = "diverged"  # its environment gave another observation or reward than before
    FAILED = "failed"  # its environment raised while its state was restored


class CannotResume(RuntimeError):
    """An episode cannot be resumed from its durable turns, and must start again."""

    def __init__(self, why: Restart, detail: str) -> None:
        super().__init__(f"{why}: {detail}")
        self.why = why


@dataclass(frozen=True, slots=True)
class EpisodeState:
    """State of an episode between two turns, without the environment's."""

    observation: Observation
    success: bool | None
    ended: Info | None = None  # the environment's end, if agent parts have turns after it: see envs.base


def pack_snapshot(state: EpisodeState, snapshot: bytes) -> bytes:
    """Encode a snapshot for storage: the episode's state, then the environment's own bytes."""
    said = as_json(messages_of(state.observation))
    head = json.dumps({"observation": said, "success": state.success, "ended": state.ended}).encode()
    return _LENGTH.pack(len(head)) + head + snapshot


def unpack_snapshot(sealed: bytes) -> tuple[EpisodeState, bytes]:
    """Decode a stored snapshot into its two parts."""
    (length,) = _LENGTH.unpack_from(sealed)
    body = _LENGTH.size + length
    head = json.loads(sealed[_LENGTH.size : body])
    return EpisodeState(**head | {"observation": json.loads(head["observation"])}), sealed[body:]


async def restore_environment(replica: Replica, task: Task, resume_from: PartialEpisode) -> EpisodeState:
    """Restore a replica's state after the last of `resume_from.turns`, which has at least one turn.

    Raises CannotResume; the replica must then be reset before use, and after FAILED discarded.
    """
    try:
        if resume_from.snapshot is not None:
            state, snapshot = unpack_snapshot(resume_from.snapshot)
            with environment_call(task, "restore"):
                await replica.reset(task.seed)
                await replica.restore(snapshot)
            return state
        if replica.nondeterministic:
            raise CannotResume(Restart.NONDETERMINISTIC, f"{task.env_id} declares itself nondeterministic")
        return await _replay(replica, task, resume_from.turns)
    except EnvironmentFailed as error:
        raise CannotResume(Restart.FAILED, str(error)) from error


async def _replay(replica: Replica, task: Task, turns: Sequence[Turn]) -> EpisodeState:
    success: bool | None = None
    ended: Info | None = None
    segment, tokens = 0, 0  # tokens of the segment before the sampled ones
    with environment_call(task, "reset"):
        observation = await replica.reset(task.seed)
        said = messages_of(observation)
    for turn in turns:
        if as_json(said) != turn.observation:
            raise CannotResume(
                Restart.DIVERGED,
                f"{task.env_id} (seed {task.seed}): turn {turn.turn} has another observation",
            )
        tokens = len(turn.prompt_ids) + (tokens if turn.segment == segment else 0)
        segment = turn.segment
        with environment_call(task, f"step {turn.turn}, played again"):
            replica.sampled(TokenUsage(tokens, len(turn.action_ids), turn.finish_reason == "length"))
            observation, reward, terminated, truncated, info = await replica.step(turn.action)
            said = messages_of(observation)
            same = all_equal([float(reward), turn.reward])
        if terminated or truncated or not same:
            raise CannotResume(
                Restart.DIVERGED,
                f"{task.env_id} (seed {task.seed}): turn {turn.turn} has another reward or end",
            )
        tokens += len(turn.action_ids)
        ended = earlier_end(info).get("ended", ended)
        if info.get("success") is not None:
            success = bool(info["success"])
    return EpisodeState(observation, success, ended)
