"""A group: sibling episodes of one task, played at the same time."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Iterable, Mapping
from typing import Any, TypeVar

from envs.hosting.host import EnvironmentFailed, Replica
from rollout.agents.agent import Actor
from rollout.engines.engine import derive_seed
from rollout.episodes.episode import (
    EpisodeLimits,
    EpisodeListener,
    EpisodeSpec,
    NullListener,
    failed,
    finished,
    run_episode,
)
from rollout.episodes.opponents import OpposedReplica, Opposing
from rollout.episodes.pool import EnvironmentPool
from rollout.episodes.resume import CannotResume, Restart
from rollout.wire.trajectory import EndReason, Group, PartialEpisode, Slot, Trajectory

T = TypeVar("T")

log = logging.getLogger(__name__)

_OPPONENT = -1  # in the place of a sibling's index, in the seed of the opponent


async def run_group(
    slot: Slot,
    pool: EnvironmentPool,
    agent: Actor,
    size: int,
    limits: EpisodeLimits,
    run_seed: int,
    worker: str = "",
    listener: EpisodeListener | None = None,
    resume_from: Mapping[int, PartialEpisode] | None = None,
    own_process: bool = False,
    opponent: Actor | None = None,
) -> Group:
    """Play `size` siblings: the same instance of the task, different sampling. resume_from: durable turns by index.

    A sibling's sampling depends on (run seed, group id, index) only, not on the attempt: with a deterministic engine a
    reissued group repeats itself, independent of scheduling. If `listener` halts it, siblings may be CANCELLED, and the
    group is not complete. own_process: give each environment its own process. opponent: plays the other seat, with
    the same randomness against all siblings: what they earn differs by their own moves.
    """
    listener, resume_from = listener or NullListener(), resume_from or {}
    opposing = None
    if opponent is not None:
        opposing = Opposing(opponent, derive_seed(run_seed, slot.group_id, _OPPONENT))
    specs = [
        EpisodeSpec(
            slot,
            index,
            derive_seed(run_seed, slot.group_id, index),
            worker,
            own_process=own_process,
            opposing=opposing,
        )
        for index in range(size)
    ]
    playing = (play(spec, pool, agent, limits, listener, resume_from.get(spec.index)) for spec in specs)
    return Group(slot, tuple(await concurrently(playing)))


async def play(
    spec: EpisodeSpec,
    pool: EnvironmentPool,
    agent: Actor,
    limits: EpisodeLimits,
    listener: EpisodeListener | None = None,
    resume_from: PartialEpisode | None = None,
) -> Trajectory:
    """Play or resume one episode on a replica of the pool, and compute its own reward; a finished one is not played."""
    episode = await _played(spec, pool, agent, limits, listener or NullListener(), resume_from)
    try:
        return await pool.pay(episode)
    except EnvironmentFailed as error:
        return failed(spec, error, episode.turns)


async def _played(
    spec: EpisodeSpec,
    pool: EnvironmentPool,
    agent: Actor,
    limits: EpisodeLimits,
    listener: EpisodeListener,
    resume_from: PartialEpisode | None,
) -> Trajectory:
    if resume_from is not None and resume_from.end is not None:
        listener.resumed(resume_from.turns)
        return finished(spec, resume_from.turns, resume_from.end)
    try:
        return await _on_a_replica(spec, pool, agent, limits, listener, resume_from)
    except CannotResume as reason:
        listener.restarted(reason.why)
        # A restart of a nondeterministic environment is expected, and no warning.
        level = logging.INFO if reason.why is Restart.NONDETERMINISTIC else logging.WARNING
        log.log(level, "group %d, episode %d starts again: %s", spec.slot.group_id, spec.index, reason)
    return await _on_a_replica(spec, pool, agent, limits, listener, None)


async def _on_a_replica(
    spec: EpisodeSpec,
    pool: EnvironmentPool,
    agent: Actor,
    limits: EpisodeLimits,
    listener: EpisodeListener,
    resume_from: PartialEpisode | None,
) -> Trajectory:
    """Play on a replica, which returns to the pool only if it is reusable and the episode did not fail."""
    try:
        replica = await pool.take(spec.task, spec.evaluation, spec.own_process)
    except EnvironmentFailed as error:
        return failed(spec, error)
    reusable = False
    played_on: Replica = replica if spec.opposing is None else OpposedReplica(replica, spec.opposing)
    try:
        trajectory = await run_episode(played_on, agent, spec, limits, listener, resume_from)
        reusable = trajectory.end_reason is not EndReason.FAILED
    except CannotResume as reason:
        reusable = reason.why is Restart.NONDETERMINISTIC
        raise
    finally:
        if reusable and replica.reusable:
            pool.give_back(spec.task, replica)
        else:
            await pool.discard(spec.task, replica)
    return trajectory


async def concurrently(coroutines: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Run coroutines concurrently; returns results in order. The first failure cancels the others and is raised."""
    try:
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(coroutine) for coroutine in coroutines]
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return [task.result() for task in running]
