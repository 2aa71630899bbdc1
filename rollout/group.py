"""The siblings of one task, played at the same time."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable
from typing import Any, TypeVar

from rollout.agent import Actor
from rollout.engine import derive_seed
from rollout.episode import Limits, Place, failed, run_episode
from rollout.pool import EnvironmentFailed, EnvironmentPool
from rollout.wire.trajectory import EndReason, Group, Slot, Trajectory

T = TypeVar("T")


async def run_group(
    slot: Slot,
    pool: EnvironmentPool,
    agent: Actor,
    size: int,
    limits: Limits,
    run_seed: int,
    worker: str = "",
) -> Group:
    """Play `size` siblings: the same instance of the task, different sampling.

    A sibling's sampling depends on (run seed, group id, index) alone. The attempt is left out: with a deterministic
    engine a group that is issued again repeats itself, however its episodes are scheduled.
    """
    places = [
        Place(slot, index, derive_seed(run_seed, slot.group_id, index), worker) for index in range(size)
    ]
    return Group(slot, tuple(await concurrently(play(place, pool, agent, limits) for place in places)))


async def play(place: Place, pool: EnvironmentPool, agent: Actor, limits: Limits) -> Trajectory:
    """One episode on a replica of the pool. A replica is reused only after an episode that did not fail."""
    try:
        env = pool.take(place.task)
    except EnvironmentFailed as error:
        return failed(place, error)
    reusable = False
    try:
        trajectory = await run_episode(env, agent, place, limits)
        reusable = trajectory.end_reason is not EndReason.FAILED
    finally:
        (pool.give_back if reusable else pool.discard)(place.task, env)
    return trajectory


async def concurrently(coroutines: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Results in order. The first failure cancels the others and is raised itself: theirs would be its echoes."""
    try:
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(coroutine) for coroutine in coroutines]
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return [task.result() for task in running]
