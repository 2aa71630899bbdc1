"""Environment replicas, made once and reused by tasks of the same environment and options."""

from __future__ import annotations

import asyncio
import logging
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from envs import registry
from envs.host import Env, EnvironmentFailed, HostSettings, Inline, Replica
from envs.hosted import Hosted
from rollout.foreign import PROGRAM, ForeignAgents
from rollout.parts.settings import PartSettings, dressed
from rollout.wire.trajectory import Task

MakeEnv = Callable[..., Env]  # (env_id, **options)

log = logging.getLogger(__name__)


@contextmanager
def asking(task: Task, what: str) -> Iterator[None]:
    """Around every call into an environment: whatever it raises becomes EnvironmentFailed.

    An environment is anybody's code and may raise anything, so this is the one place that catches everything.
    """
    try:
        yield
    except Exception as error:
        said = str(error) if isinstance(error, EnvironmentFailed) else repr(error)
        raise EnvironmentFailed(f"{task.env_id} (seed {task.seed}) failed in {what}: {said}") from error


class EnvironmentPool:
    """Idle replicas by (environment, options); as many exist as were ever used at the same time.

    Each is dressed in the agent's parts. With host.where="process", what `make` is given and is itself must be
    picklable.
    """

    def __init__(
        self,
        make: MakeEnv = registry.make,
        host: HostSettings | None = None,
        parts: Sequence[PartSettings] = (),
    ) -> None:
        self._make = make
        self._parts = tuple(parts)
        self._host = host or HostSettings()
        # Interpreters that start compete for the processors: more at once would only use up each other's limit.
        self._starting = asyncio.Semaphore(os.cpu_count() or 1)
        self._idle: dict[tuple[str, str], list[Replica]] = defaultdict(list)
        self._foreign = ForeignAgents(self._host)

    async def take(self, task: Task) -> Replica:
        """A replica for this task, to be reset by whoever takes it. Raises EnvironmentFailed when none can be made."""
        idle = self._idle[task.env_id, task.options]
        if idle:
            return idle.pop()
        with asking(task, "make"):
            if task.env_id == PROGRAM:
                return self._foreign.replica(task.kwargs)
            if self._host.where == "inline":
                return Inline(dressed(partial(self._make, task.env_id, **task.kwargs), self._parts))
            recipe = registry.recipe if self._make is registry.make else partial(partial, self._make)
            made = partial(dressed, recipe(task.env_id, **task.kwargs), self._parts)
            async with self._starting:
                return await Hosted.start(made, self._host)

    def give_back(self, task: Task, replica: Replica) -> None:
        """For the next episode to reuse; only after an episode that left it in a known state."""
        self._idle[task.env_id, task.options].append(replica)

    async def discard(self, task: Task, replica: Replica) -> None:
        """Throw away a replica in an unknown state; that it cannot even be closed is logged, not raised."""
        try:
            with asking(task, "close"):
                await replica.close()
        except EnvironmentFailed as error:
            log.warning("%s", error)

    async def close(self) -> None:
        """Close every idle replica, and the endpoint where there is one."""
        idle, self._idle = self._idle, defaultdict(list)
        await asyncio.gather(
            *(
                self.discard(Task(env_id, 0, options), replica)
                for (env_id, options), replicas in idle.items()
                for replica in replicas
            )
        )
        await self._foreign.close()
