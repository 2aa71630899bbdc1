"""A replica on any node of a Ray cluster: an actor, which owns a process of subprocess_env.py.

    worker                                 actor, on a node with room          its process
    RemoteEnv.start  factory, pickled ->    SubprocessEnv.start          ->    makes the environment
    reset, step      a call           ->    the same, within its limit   ->    calls the environment
                     <-  results and errors of SubprocessEnv     <-   JSON and bytes
    close            a call, a kill   ->    closes it                    ->    closes the environment and exits

The environment never runs in a process connected to Ray: the actor receives its answers as JSON and returns plain
values. The actor enforces the limits of env.host and kills a process that does not answer, with all its children. The
worker waits slightly longer; then it considers the actor, its node or the connection lost, and drops the actor. Actors
end with the process that started them: Ray ends actors without an owner, and the kernel ends the processes below them.
"""

from __future__ import annotations

import asyncio
import os
import pickle
import socket
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from envs.base import Observation
from envs.hosting.host import (
    ClusterFull,
    Env,
    EnvironmentFailed,
    EnvironmentTimeout,
    HostSettings,
    Outcome,
    TokenUsage,
)
from envs.hosting.subprocess_env import RemoteTraceback, SubprocessEnv

MARGIN_SECONDS = 5.0  # added to the actor's own limit, for the round trip of a call
_CLOSE_SECONDS = 5.0  # limit for an actor to end its process


class ReplicaActor:
    """Hosts one `SubprocessEnv`; its methods are those of `Replica` and raise the same errors."""

    def __init__(self, settings: HostSettings) -> None:
        self._settings = settings
        self._replica: SubprocessEnv | None = None

    async def location(self) -> tuple[str, int]:
        """Host name and pid; answered once the actor is running."""
        return socket.gethostname(), os.getpid()

    async def start(self, factory: bytes) -> bool:
        """Make the environment; returns whether it is nondeterministic."""
        self._replica = await SubprocessEnv.start(factory, self._settings)
        return self._replica.nondeterministic

    async def reset(self, seed: int) -> Observation:
        return await self._started().reset(seed)

    async def step(self, action: str, sampled: TokenUsage) -> tuple[Outcome, bytes | None]:
        """The outcome and the snapshot after it."""
        replica = self._started()
        replica.sampled(sampled)
        return await replica.step(action), replica.snapshot()

    async def restore(self, snapshot: bytes) -> None:
        await self._started().restore(snapshot)

    async def close(self) -> None:
        if self._replica is not None:
            await self._replica.close()

    def _started(self) -> SubprocessEnv:
        if self._replica is None:
            raise RuntimeError("start() of a replica's actor was not called")
        return self._replica


class RemoteEnv:
    """A `Replica` behind the handle of its actor. Raises EnvironmentFailed if the actor or its node is lost."""

    reusable = True

    def __init__(self, handle: Any, settings: HostSettings) -> None:
        self.nondeterministic = False
        self.pid = 0  # of the actor on `host`
        self.host = ""
        self._handle = handle
        self._settings = settings
        self._snapshot: bytes | None = None
        self._sampled = TokenUsage(0, 0, cut=False)

    @classmethod
    async def start(cls, factory: Callable[[], Env], settings: HostSettings) -> RemoteEnv:
        """Wait for a node with room, then for the environment, up to start_seconds each. Raises ClusterFull."""
        options = {"num_cpus": settings.cpus_per_replica, "resources": settings.resources}
        replica = cls(ray.remote(ReplicaActor).options(**options).remote(settings), settings)
        try:
            await replica._scheduled()
            carried = replica._handle.start.remote(pickle.dumps(factory))
            replica.nondeterministic = await replica._answer(carried, settings.start_seconds)
        except BaseException:
            replica._kill()
            raise
        return replica

    async def reset(self, seed: int) -> Observation:
        observation: Observation = await self._answer(
            self._handle.reset.remote(seed), self._settings.reset_seconds
        )
        return observation

    async def step(self, action: str) -> Outcome:
        outcome: Outcome
        outcome, self._snapshot = await self._answer(
            self._handle.step.remote(action, self._sampled), self._settings.step_seconds
        )
        return outcome

    def sampled(self, sampled: TokenUsage) -> None:
        self._sampled = sampled  # sent with the next step

    def snapshot(self) -> bytes | None:
        return self._snapshot  # received with the step's answer

    async def restore(self, snapshot: bytes) -> None:
        await self._answer(self._handle.restore.remote(snapshot), self._settings.reset_seconds)

    async def close(self) -> None:
        """Close the environment, unless a request is still unanswered, and end the actor if it is alive."""
        try:
            async with asyncio.timeout(_CLOSE_SECONDS):
                await self._handle.close.remote()
        except (TimeoutError, RayActorError):
            pass  # killed below
        finally:
            self._kill()

    async def _scheduled(self) -> None:
        settings = self._settings
        try:
            async with asyncio.timeout(settings.start_seconds) as clock:
                self.host, self.pid = await self._handle.location.remote()
        except TimeoutError:
            if not clock.expired():
                raise
            claimed = ", ".join(f"{amount:g} {name}" for name, amount in settings.claims.items())
            raise ClusterFull(
                f"no node of the cluster had room for it within {settings.start_seconds:g} s (env.host.start_seconds); "
                f"it claims {claimed}: lower env.host.cpus_per_replica or resources, or add nodes"
            ) from None
        except RayActorError as error:
            raise EnvironmentFailed("its actor could not be started") from error

    async def _answer(self, reference: Any, seconds: float) -> Any:
        """The actor's answer, within the actor's own limit plus the margin."""
        limit = seconds + MARGIN_SECONDS
        try:
            async with asyncio.timeout(limit) as clock:
                return await reference
        except TimeoutError:
            if not clock.expired():
                raise
            self._kill()
            raise EnvironmentTimeout(
                f"its actor ({self._location}) did not answer within {limit:g} s and was killed"
            ) from None
        except RayActorError as error:
            raise EnvironmentFailed(f"its actor ({self._location}) or its node died") from error
        except RayTaskError as error:
            # Only SubprocessEnv's own errors, which hold text, and bugs of Manta arrive here.
            if not isinstance(error.cause, EnvironmentFailed):
                raise
            text = f"{error.cause} (host {self.host})"
            raise type(error.cause)(text) from RemoteTraceback(error.traceback_str)

    @property
    def _location(self) -> str:
        return f"pid {self.pid} on {self.host}"

    def _kill(self) -> None:
        ray.kill(self._handle)
