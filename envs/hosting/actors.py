"""A replica on any node of a Ray cluster: an actor there, and below it the process of subprocess_env.py.

    worker                                 actor, on a node with room          its process
    Remote.start   recipe, pickled   ->    SubprocessEnv.start          ->    makes the environment
    reset, step    a call            ->    the same, within its limit    ->    asks the environment
                   <-  what SubprocessEnv returns, raises  <-   JSON and bytes
    close          a call, a kill    ->    closes it                     ->    closes the environment and ends

The environment never runs in a process that speaks Ray: what comes from it was read as JSON by the actor, and travels
on as plain values. The actor keeps the limits of env.host, and kills what does not answer with all it has started. The
worker waits a little longer; then the actor, its node or the way there is lost, and the actor is given up. It ends with
the process that started it, however that ends: Ray ends actors without an owner, and the kernel what is below them.
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
from envs.hosting.host import Env, EnvironmentFailed, EnvironmentStuck, HostSettings, NoRoom, Outcome, Sampled
from envs.hosting.subprocess_env import RemoteTraceback, SubprocessEnv

MARGIN_SECONDS = 5.0  # beyond a limit that the actor keeps, for a call's way there and back
_CLOSE_SECONDS = 5.0  # what an actor is given to see its process ended


class ReplicaActor:
    """Hosts one `SubprocessEnv`; its methods are those of `Replica`, and raise what they raise."""

    def __init__(self, settings: HostSettings) -> None:
        self._settings = settings
        self._replica: SubprocessEnv | None = None

    async def place(self) -> tuple[str, int]:
        """Host and pid, which is also the word that the actor is up."""
        return socket.gethostname(), os.getpid()

    async def start(self, recipe: bytes) -> bool:
        """Have the environment made; returns whether it is nondeterministic."""
        self._replica = await SubprocessEnv.start(recipe, self._settings)
        return self._replica.nondeterministic

    async def reset(self, seed: int) -> Observation:
        return await self._started().reset(seed)

    async def step(self, action: str, sampled: Sampled) -> tuple[Outcome, bytes | None]:
        """The outcome, and the snapshot after it."""
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
            raise RuntimeError("a replica's actor was used before start()")
        return self._replica


class Remote:
    """A `Replica` over the handle of its actor. Raises EnvironmentFailed where the actor or its node is lost."""

    reusable = True

    def __init__(self, handle: Any, settings: HostSettings) -> None:
        self.nondeterministic = False
        self.pid = 0  # of the actor, on `host`
        self.host = ""
        self._handle = handle
        self._settings = settings
        self._snapshot: bytes | None = None
        self._sampled = Sampled(0, 0, cut=False)

    @classmethod
    async def start(cls, recipe: Callable[[], Env], settings: HostSettings) -> Remote:
        """Wait for a node with room, then for the environment, start_seconds each. Raises NoRoom."""
        options = {"num_cpus": settings.cpus_per_replica, "resources": settings.resources}
        replica = cls(ray.remote(ReplicaActor).options(**options).remote(settings), settings)
        try:
            await replica._placed()
            carried = replica._handle.start.remote(pickle.dumps(recipe))
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

    def sampled(self, sampled: Sampled) -> None:
        self._sampled = sampled  # it goes with the step

    def snapshot(self) -> bytes | None:
        return self._snapshot  # it came with the answer

    async def restore(self, snapshot: bytes) -> None:
        await self._answer(self._handle.restore.remote(snapshot), self._settings.reset_seconds)

    async def close(self) -> None:
        """Let the environment close, unless it still owes an answer, and end the actor where it still lives."""
        try:
            async with asyncio.timeout(_CLOSE_SECONDS):
                await self._handle.close.remote()
        except (TimeoutError, RayActorError):
            pass  # what is not closed in time is ended without
        finally:
            self._kill()

    async def _placed(self) -> None:
        settings = self._settings
        try:
            async with asyncio.timeout(settings.start_seconds) as clock:
                self.host, self.pid = await self._handle.place.remote()
        except TimeoutError:
            if not clock.expired():
                raise
            claimed = ", ".join(f"{amount:g} {name}" for name, amount in settings.claims.items())
            raise NoRoom(
                f"no node of the cluster took it within {settings.start_seconds:g} s (env.host.start_seconds); "
                f"it claims {claimed}"
            ) from None
        except RayActorError as error:
            raise EnvironmentFailed("its actor could not be made") from error

    async def _answer(self, reference: Any, seconds: float) -> Any:
        """What the actor says within its own limit and the margin."""
        limit = seconds + MARGIN_SECONDS
        try:
            async with asyncio.timeout(limit) as clock:
                return await reference
        except TimeoutError:
            if not clock.expired():
                raise
            self._kill()
            raise EnvironmentStuck(
                f"its actor ({self._place}) did not answer within {limit:g} s and was killed"
            ) from None
        except RayActorError as error:
            raise EnvironmentFailed(f"its actor ({self._place}) died, or its node") from error
        except RayTaskError as error:
            # Only SubprocessEnv's own errors, which are words, and faults of ours come this way.
            if not isinstance(error.cause, EnvironmentFailed):
                raise
            said = f"{error.cause} (host {self.host})"
            raise type(error.cause)(said) from RemoteTraceback(error.traceback_str)

    @property
    def _place(self) -> str:
        return f"pid {self.pid} on {self.host}"

    def _kill(self) -> None:
        ray.kill(self._handle)
