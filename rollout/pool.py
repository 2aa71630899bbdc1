"""Environment replicas, made once and reused by tasks of the same environment and options."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import gymnasium as gym

from envs import registry
from rollout.wire.trajectory import Task

Env = gym.Env[Any, str]  # text or chat messages in, text out: see envs.base
MakeEnv = Callable[..., Env]  # (env_id, **options)

log = logging.getLogger(__name__)


class EnvironmentFailed(RuntimeError):
    """An environment raised; its own exception is the cause. It costs one episode and that replica."""


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
        self._idle: dict[tuple[str, str], list[Env]] = defaultdict(list)

    def take(self, task: Task) -> Env:
        """A replica for this task, to be reset by whoever takes it. Raises EnvironmentFailed when none can be made."""
        idle = self._idle[task.env_id, task.options]
        if idle:
            return idle.pop()
        with asking(task, "make"):
            return self._make(task.env_id, **task.kwargs)

    def give_back(self, task: Task, env: Env) -> None:
        """For the next episode to reuse; only after an episode that ended as an environment ends it."""
        self._idle[task.env_id, task.options].append(env)

    def discard(self, task: Task, env: Env) -> None:
        """Throw away a replica in an unknown state; that it cannot even be closed is logged, not raised."""
        try:
            with asking(task, "close"):
                env.close()
        except EnvironmentFailed as error:
            log.warning("%s", error)

    def close(self) -> None:
        """Close every idle replica."""
        for (env_id, options), replicas in self._idle.items():
            for env in replicas:
                self.discard(Task(env_id, 0, options), env)
        self._idle.clear()
