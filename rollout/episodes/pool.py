"""Environment replicas, made once and reused by tasks of the same environment and options."""

from __future__ import annotations

import asyncio
import logging
import os
import pickle
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

from envs import registry
from envs.call_thread import call_gate
from envs.hosting.host import Env, EnvironmentFailed, HostSettings, InProcessEnv, NoRoom, Replica
from envs.hosting.subprocess_env import SubprocessEnv
from envs.own_frames import told
from rollout.agents.settings import PartSettings, dressing, evaluated
from rollout.chat.chat import Chat
from rollout.episodes.reward import OwnReward, rewarded
from rollout.external.external_env import PROGRAM, ForeignAgents
from rollout.wire.trajectory import Task, Trajectory

MakeEnv = Callable[..., Env]  # (env_id, **options)
Start = Callable[[Callable[[], Env], HostSettings], Awaitable[Replica]]  # outside of this process


class Kind(NamedTuple):
    """What replicas of have in common that may take one another's place."""

    env_id: str
    options: str
    measuring: bool  # dressed as evaluations are
    apart: bool  # in a process where others are not


log = logging.getLogger(__name__)


@contextmanager
def asking(task: Task, what: str) -> Iterator[None]:
    """Around every call into an environment: whatever it raises becomes EnvironmentFailed.

    An environment is anybody's code and may raise anything, so this is the one place that catches everything.
    """
    try:
        yield
    except Exception as error:
        said = str(error) if isinstance(error, EnvironmentFailed) else told(error)
        raise EnvironmentFailed(f"{task.env_id} (seed {task.seed}) failed in {what}: {said}") from error


class EnvironmentPool:
    """Idle replicas by (environment, options); as many exist as were ever used at the same time.

    Each is dressed in the agent's parts; where these learn, evaluations have replicas of their own. host.where="auto"
    is inline for what registry.is_trusted, and for all that a `make` of one's own makes, which runs on the event loop
    itself. Where replicas are not inline, what `make` is given and is itself must be picklable, and `start` starts
    replicas: SubprocessEnv's for "process", that of envs/hosting/actors.py for "ray".

    chat: the policy's; foreign agents are told of requests that it cannot render. reward: in place of what the
    environments pay, or beside it.
    """

    def __init__(
        self,
        make: MakeEnv = registry.make,
        host: HostSettings | None = None,
        parts: Sequence[PartSettings] = (),
        start: Start | None = None,
        chat: Chat | None = None,
        reward: OwnReward | None = None,
    ) -> None:
        self._make = make
        self._reward = reward
        self._parts = tuple(parts)
        self._evaluated = evaluated(self._parts)
        self._host = host or HostSettings()
        if self._host.where == "ray" and start is None:
            raise ValueError("replicas on a Ray cluster are started by envs.hosting.actors.Remote.start")
        self._start = start or SubprocessEnv.start
        # Interpreters that start compete for the processors: more at once would only use up each other's limit.
        self._starting = asyncio.Semaphore(len(os.sched_getaffinity(0)))
        self._calls = call_gate()
        self._idle: dict[Kind, asyncio.LifoQueue[Replica]] = defaultdict(asyncio.LifoQueue)
        self._alive: Counter[Kind] = Counter()  # idle or in use
        self._kinds: dict[Replica, Kind] = {}  # of all that are alive
        self._foreign = ForeignAgents(self._host, chat)

    async def pay(self, episode: Trajectory) -> Trajectory:
        """An episode that has ended, with its reward. Raises EnvironmentFailed where that cannot be told."""
        return await rewarded(episode, self._reward, self._host.step_seconds)

    async def take(self, task: Task, evaluation: bool = False, apart: bool = False) -> Replica:
        """A replica for this task, to be reset by whoever takes it. Raises EnvironmentFailed when none can be made.

        apart: in a process of its own where it would be inline, so that it takes nothing along when it dies.
        """
        kind = Kind(task.env_id, task.options, evaluation and self._evaluated != self._parts, apart)
        idle = self._idle[kind]
        if not idle.empty():
            return idle.get_nowait()
        with asking(task, "make"):
            return await (self._new_or_returned(kind) if self._host.where == "ray" else self._new(kind))

    def give_back(self, task: Task, replica: Replica) -> None:
        """For the next episode to reuse; only after an episode that left it in a known state."""
        self._idle[self._kinds[replica]].put_nowait(replica)

    async def discard(self, task: Task, replica: Replica) -> None:
        """Throw away a replica in an unknown state; that it cannot even be closed is logged, not raised."""
        self._alive[self._kinds.pop(replica)] -= 1
        try:
            with asking(task, "close"):
                await replica.close()
        except EnvironmentFailed as error:
            log.warning("%s", error)

    async def close(self) -> None:
        """Close every idle replica, and the endpoint where there is one."""
        await asyncio.gather(*(self.discard(task, replica) for task, replica in self._all_idle()))
        await self._foreign.close()

    def _all_idle(self) -> Iterator[tuple[Task, Replica]]:
        """Every idle replica, which is the caller's from there on."""
        for kind, idle in list(self._idle.items()):
            while not idle.empty():
                yield Task(kind.env_id, 0, kind.options), idle.get_nowait()

    async def _new(self, kind: Kind) -> Replica:
        replica = await self._made(kind)
        self._alive[kind] += 1
        self._kinds[replica] = kind
        return replica

    async def _made(self, kind: Kind) -> Replica:
        env_id = kind.env_id
        task, parts = Task(env_id, 0, kind.options), self._evaluated if kind.measuring else self._parts
        if env_id == PROGRAM:
            return self._foreign.replica(task.kwargs, kind.apart)
        recipe = registry.recipe if self._make is registry.make else partial(partial, self._make)
        made = dressing(recipe(env_id, **task.kwargs), parts)
        inline = self._is_inline(env_id)
        if inline and not (kind.apart and _can_be_carried(made)):
            if self._make is registry.make or self._host.where == "inline":
                return await InProcessEnv.start(made, self._host, self._calls)
            return InProcessEnv(made())
        async with self._starting:
            return await (SubprocessEnv.start if inline else self._start)(made, self._host)

    def _is_inline(self, env_id: str) -> bool:
        if self._host.where == "auto":
            return self._make is not registry.make or registry.is_trusted(env_id)
        return self._host.where == "inline"

    # On a cluster replicas claim room, and there may be less of it than episodes, a node having been lost.

    async def _new_or_returned(self, kind: Kind) -> Replica:
        """A new replica, or one that is given back while there is no room for a new one.

        Raises NoRoom where none exists that could be given back. Whoever has one has it for an episode at most.
        """
        for other, replica in self._all_idle():  # none of this kind is; what another kind claims makes room
            await self.discard(other, replica)
            break
        while True:
            try:
                return await self._whichever_is_first(kind)
            except NoRoom as error:
                alive = self._alive[kind]
                if not alive:
                    raise
                log.warning("a replica of %s: %s; episodes take turns on %d", kind.env_id, error, alive)

    async def _whichever_is_first(self, kind: Kind) -> Replica:
        idle = self._idle[kind]
        returned, new = asyncio.create_task(idle.get()), asyncio.create_task(self._new(kind))
        chosen: asyncio.Task[Replica] | None = None

        def keep(other: asyncio.Task[Replica]) -> None:
            if not other.cancelled() and not other.exception():  # it came all the same
                idle.put_nowait(other.result())

        try:
            await asyncio.wait({returned, new}, return_when=asyncio.FIRST_COMPLETED)
            chosen = returned if returned.done() else new
            return chosen.result()
        finally:
            for other in {returned, new} - {chosen}:
                other.cancel()
                other.add_done_callback(keep)


def _can_be_carried(made: Callable[[], Env]) -> bool:
    """Whether another process can be told how to make it."""
    try:
        pickle.dumps(made)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        log.warning("a replica is played inline although a worker was lost by one like it: %s", error)
        return False
    return True
