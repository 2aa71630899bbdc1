"""Environment replicas, made once and reused by tasks of the same environment and options."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from envs import registry
from envs.host import Env, EnvironmentFailed, Inline, Replica
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
        raise EnvironmentFailed(f"{task.env_id} (seed {task.seed}) failed in {what}: {error!r}") from error


class EnvironmentPool:
    """Idle replicas by (environment, options); as many exist as were ever used at the same time."""

    def __init__(self, make: MakeEnv = registry.make) -> None:
        self._make = make
        self._idle: dict[tuple[str, str], list[Replica]] = defaultdict(list)

    async def take(self, task: Task) -> Replica:
        """A replica for this task, to be reset by whoever takes it. Raises EnvironmentFailed when none can be made."""
        idle = self._idle[task.env_id, task.options]
        if idle:
            return idle.pop()
        with asking(task, "make"):
            return Inline(self._make(task.env_id, **task.kwargs))

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
        """Close every idle replica."""
        idle, self._idle = self._idle, defaultdict(list)
        for (env_id, options), replicas in idle.items():
            for replica in replicas:
                await self.discard(Task(env_id, 0, options), replica)
