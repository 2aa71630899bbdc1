"""How an episode goes on from its durable turns: the environment is brought to where it stood after the last of them.

snapshots offered         restored from the one of the last turn
nondeterministic          not to be brought back: the episode starts again
any other                 reset with the task's seed, and the stored actions are played again; what it says and
                          pays must be what is stored
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from envs.base import Info, Observation, end_behind
from envs.hosting.host import EnvironmentFailed, Replica, Sampled
from rollout.agents.agent import as_messages
from rollout.chat.chat import as_json
from rollout.episodes.pool import asking
from rollout.wire.equality import all_equal
from rollout.wire.trajectory import EpisodeSoFar, Step, Task

_LENGTH = struct.Struct("<I")  # of the JSON that stands before an environment's own bytes


class Restart(StrEnum):
    """Why an episode starts again although turns of it are durable."""

    NONDETERMINISTIC = "nondeterministic"  # its environment may not repeat itself, and left no snapshot
    DIVERGED = "diverged"  # its environment said or paid something else than before
    FAILED = "failed"  # its environment raised on the way


class CannotGoOn(RuntimeError):
    """The durable turns of an episode lead nowhere; it is to start again."""

    def __init__(self, why: Restart, detail: str) -> None:
        super().__init__(f"{why}: {detail}")
        self.why = why


@dataclass(frozen=True, slots=True)
class Standing:
    """Where an episode stands between two turns, as far as its runner knows it."""

    observation: Observation
    success: bool | None
    ended: Info | None = None  # an end that lies behind: see envs.base


def seal(standing: Standing, snapshot: bytes) -> bytes:
    """A snapshot as it is stored: what the runner must know, then the environment's own bytes."""
    said = as_json(as_messages(standing.observation))
    head = json.dumps({"observation": said, "success": standing.success, "ended": standing.ended}).encode()
    return _LENGTH.pack(len(head)) + head + snapshot


def unseal(sealed: bytes) -> tuple[Standing, bytes]:
    """The two parts of a stored snapshot."""
    (length,) = _LENGTH.unpack_from(sealed)
    body = _LENGTH.size + length
    head = json.loads(sealed[_LENGTH.size : body])
    return Standing(**head | {"observation": json.loads(head["observation"])}), sealed[body:]


async def bring_back(replica: Replica, task: Task, so_far: EpisodeSoFar) -> Standing:
    """Bring a replica to where it stood after the last of `so_far.steps`, of which there is one at least.

    Raises CannotGoOn; the replica is then good for nothing but a reset, and after FAILED not even that.
    """
    try:
        if so_far.snapshot is not None:
            standing, snapshot = unseal(so_far.snapshot)
            with asking(task, "restore"):
                await replica.reset(task.seed)
                await replica.restore(snapshot)
            return standing
        if replica.nondeterministic:
            raise CannotGoOn(Restart.NONDETERMINISTIC, f"{task.env_id} says so of itself")
        return await _replay(replica, task, so_far.steps)
    except EnvironmentFailed as error:
        raise CannotGoOn(Restart.FAILED, str(error)) from error


async def _replay(replica: Replica, task: Task, steps: Sequence[Step]) -> Standing:
    success: bool | None = None
    ended: Info | None = None
    segment, tokens = 0, 0  # of the segment, up to where the policy speaks
    with asking(task, "reset"):
        observation = await replica.reset(task.seed)
        said = as_messages(observation)
    for step in steps:
        if as_json(said) != step.observation:
            raise CannotGoOn(Restart.DIVERGED, f"{task.env_id} (seed {task.seed}): another turn {step.turn}")
        tokens = len(step.prompt_ids) + (tokens if step.segment == segment else 0)
        segment = step.segment
        with asking(task, f"step {step.turn}, played again"):
            replica.sampled(Sampled(tokens, len(step.action_ids), step.finish_reason == "length"))
            observation, reward, terminated, truncated, info = await replica.step(step.action)
            said = as_messages(observation)
            same = all_equal([float(reward), step.reward])
        if terminated or truncated or not same:
            raise CannotGoOn(
                Restart.DIVERGED, f"{task.env_id} (seed {task.seed}): turn {step.turn} went otherwise"
            )
        tokens += len(step.action_ids)
        ended = end_behind(info).get("ended", ended)
        if info.get("success") is not None:
            success = bool(info["success"])
    return Standing(observation, success, ended)
