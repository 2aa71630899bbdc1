"""The siblings of one task, played at the same time."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Iterable, Mapping
from typing import Any, TypeVar

from envs.hosting.host import EnvironmentFailed
from rollout.agents.agent import Actor
from rollout.engines.engine import derive_seed
from rollout.episodes.episode import Limits, Place, Unwatched, Watch, failed, finished, run_episode
from rollout.episodes.pool import EnvironmentPool
from rollout.episodes.resume import CannotGoOn, Restart
from rollout.wire.trajectory import EndReason, EpisodeSoFar, Group, Slot, Trajectory

T = TypeVar("T")

log = logging.getLogger(__name__)


async def run_group(
    slot: Slot,
    pool: EnvironmentPool,
    agent: Actor,
    size: int,
    limits: Limits,
    run_seed: int,
    worker: str = "",
    watch: Watch | None = None,
    so_far: Mapping[int, EpisodeSoFar] | None = None,
    apart: bool = False,
) -> Group:
    """Play `size` siblings: the same instance of the task, different sampling. so_far: by index, what is durable.

    A sibling's sampling depends on (run seed, group id, index) alone. The attempt is left out: with a deterministic
    engine a group that is issued again repeats itself, however its episodes are scheduled. Where `watch` halts it,
    siblings may be CANCELLED: such a group is no group yet. apart: with environments in processes of their own.
    """
    watch, so_far = watch or Unwatched(), so_far or {}
    places = [
        Place(slot, index, derive_seed(run_seed, slot.group_id, index), worker, apart=apart)
        for index in range(size)
    ]
    playing = (play(place, pool, agent, limits, watch, so_far.get(place.index)) for place in places)
    return Group(slot, tuple(await concurrently(playing)))


async def play(
    place: Place,
    pool: EnvironmentPool,
    agent: Actor,
    limits: Limits,
    watch: Watch | None = None,
    so_far: EpisodeSoFar | None = None,
) -> Trajectory:
    """One episode on a replica of the pool, from where it stands, paid by the pool: a finished one is not played."""
    episode = await _played(place, pool, agent, limits, watch or Unwatched(), so_far)
    try:
        return await pool.pay(episode)
    except EnvironmentFailed as error:
        return failed(place, error, episode.steps)


async def _played(
    place: Place,
    pool: EnvironmentPool,
    agent: Actor,
    limits: Limits,
    watch: Watch,
    so_far: EpisodeSoFar | None,
) -> Trajectory:
    if so_far is not None and so_far.end is not None:
        watch.resumed(so_far.steps)
        return finished(place, so_far.steps, so_far.end)
    try:
        return await _on_a_replica(place, pool, agent, limits, watch, so_far)
    except CannotGoOn as reason:
        watch.restarted(reason.why)
        # That of an environment that does not repeat itself is nothing to be told of.
        level = logging.INFO if reason.why is Restart.NONDETERMINISTIC else logging.WARNING
        log.log(level, "group %d, episode %d starts again: %s", place.slot.group_id, place.index, reason)
    return await _on_a_replica(place, pool, agent, limits, watch, None)


async def _on_a_replica(
    place: Place,
    pool: EnvironmentPool,
    agent: Actor,
    limits: Limits,
    watch: Watch,
    so_far: EpisodeSoFar | None,
) -> Trajectory:
    """A replica is reused only after an episode that did not fail, and where it can be."""
    try:
        replica = await pool.take(place.task, place.evaluation, place.apart)
    except EnvironmentFailed as error:
        return failed(place, error)
    reusable = False
    try:
        trajectory = await run_episode(replica, agent, place, limits, watch, so_far)
        reusable = trajectory.end_reason is not EndReason.FAILED
    except CannotGoOn as reason:
        reusable = reason.why is Restart.NONDETERMINISTIC
        raise
    finally:
        if reusable and replica.reusable:
            pool.give_back(place.task, replica)
        else:
            await pool.discard(place.task, replica)
    return trajectory


async def concurrently(coroutines: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Results in order. The first failure cancels the others and is raised itself: theirs would be its echoes."""
    try:
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(coroutine) for coroutine in coroutines]
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return [task.result() for task in running]
