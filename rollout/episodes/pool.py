"""Pool of environment replicas, which are reused by tasks of the same environment and options."""

from __future__ import annotations

import asyncio
import logging
import os
import pickle
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

from envs import registry
from envs.call_thread import call_gate
from envs.code_lines import describe_error
from envs.hosting.host import ClusterFull, Env, EnvironmentFailed, HostSettings, InProcessEnv, Replica
from envs.hosting.subprocess_env import SubprocessEnv
from rollout.agents.settings import PartSettings, evaluated, wrapping
from rollout.chat.chat import Chat
from rollout.engines.engine import EngineDied
from rollout.episodes.reward import OwnReward, rewarded
from rollout.external.external_env import PROGRAM, ForeignAgents
from rollout.wire.trajectory import EnvironmentKey, Task, Trajectory

MakeEnv = Callable[..., Env]  # (env_id, **options)
Start = Callable[[Callable[[], Env], HostSettings], Awaitable[Replica]]  # outside of this process


class ReplicaKind(NamedTuple):
    """Key of interchangeable replicas."""

    env_id: str
    options: str
    evaluation: bool  # wrapped in the parts of evaluations
    own_process: bool  # in a process of its own where others are inline


class Hosting(NamedTuple):
    """Where the replicas of an environment run, what they are wrapped in, and what pays their episodes."""

    host: HostSettings = HostSettings()
    parts: tuple[PartSettings, ...] = ()  # of the agent
    reward: OwnReward | None = (
        None  # a user's own, which replaces the environment's rewards or is added to them
    )


log = logging.getLogger(__name__)


@contextmanager
def environment_call(task: Task, what: str) -> Iterator[None]:
    """Context of every call into an environment: all its errors become EnvironmentFailed.

    An environment is foreign code that may raise any exception, so everything is caught here and only here.
    """
    try:
        yield
    except EngineDied:  # of an opponent, which plays inside the environment
        raise
    except Exception as error:
        said = str(error) if isinstance(error, EnvironmentFailed) else describe_error(error)
        raise EnvironmentFailed(f"{task.env_id} (seed {task.seed}) failed in {what}: {said}") from error


class EnvironmentPool:
    """Idle replicas by kind; as many exist as were used at the same time.

    Each is wrapped in the agent's parts; if these learn, evaluations have their own replicas. host.where="auto" is
    inline for environments that registry.is_trusted, and for a custom `make`, whose environments run on the event loop.
    Replicas that are not inline need a picklable `make` with picklable arguments. "process" starts them in processes,
    "ray" by `start`, that of envs/hosting/actors.py.

    chat: of the policy; requests of foreign agents that it cannot render are refused. hosting: of single environments,
    whose tasks have these ids and options; host, parts and reward are those of all others.
    """

    def __init__(
        self,
        make: MakeEnv = registry.make,
        host: HostSettings | None = None,
        parts: Sequence[PartSettings] = (),
        start: Start | None = None,
        chat: Chat | None = None,
        reward: OwnReward | None = None,
        hosting: Mapping[EnvironmentKey, Hosting] | None = None,
    ) -> None:
        self._make = make
        self._others = Hosting(host or HostSettings(), tuple(parts), reward)
        self._hosting = dict(hosting or {})
        hosts = [each.host.where for each in (self._others, *self._hosting.values())]
        if "ray" in hosts and start is None:
            raise ValueError("host.where='ray' needs start=envs.hosting.actors.Remote.start")
        self._start = start or SubprocessEnv.start
        # Starting interpreters compete for the processors: more at once would only exceed their time limits.
        self._starting = asyncio.Semaphore(len(os.sched_getaffinity(0)))
        self._calls = call_gate()
        self._idle: dict[ReplicaKind, asyncio.LifoQueue[Replica]] = defaultdict(asyncio.LifoQueue)
        self._alive: Counter[ReplicaKind] = Counter()  # idle or in use
        self._kinds: dict[Replica, ReplicaKind] = {}  # of all replicas, idle or in use
        self._foreign = ForeignAgents(chat)

    async def pay(self, episode: Trajectory) -> Trajectory:
        """Add the user's own reward to an episode that has ended. Raises EnvironmentFailed if it cannot be computed."""
        host, _, reward = self._of(episode.task.environment)
        return await rewarded(episode, reward, host.step_seconds)

    async def take(self, task: Task, evaluation: bool = False, own_process: bool = False) -> Replica:
        """Return a replica for this task, which the caller resets. Raises EnvironmentFailed if none can be made.

        own_process: in its own process instead of inline, so that a crash does not end the worker.
        """
        host, parts, _ = self._of(task.environment)
        kind = ReplicaKind(*task.environment, evaluation and evaluated(parts) != parts, own_process)
        idle = self._idle[kind]
        if not idle.empty():
            return idle.get_nowait()
        with environment_call(task, "make"):
            return await (self._new_or_returned(kind) if host.where == "ray" else self._new(kind))

    def give_back(self, task: Task, replica: Replica) -> None:
        """Return a replica for reuse, after an episode that left it in a known state."""
        self._idle[self._kinds[replica]].put_nowait(replica)

    async def discard(self, task: Task, replica: Replica) -> None:
        """Close a replica in an unknown state; an error of closing it is logged, not raised."""
        self._alive[self._kinds.pop(replica)] -= 1
        try:
            with environment_call(task, "close"):
                await replica.close()
        except EnvironmentFailed as error:
            log.warning("%s", error)

    async def close(self) -> None:
        """Close every idle replica, and the endpoint of foreign agents."""
        await asyncio.gather(*(self.discard(task, replica) for task, replica in self._all_idle()))
        await self._foreign.close()

    def _of(self, environment: EnvironmentKey) -> Hosting:
        return self._hosting.get(environment, self._others)

    def _all_idle(self) -> Iterator[tuple[Task, Replica]]:
        """Take every idle replica out of the pool."""
        for kind, idle in list(self._idle.items()):
            while not idle.empty():
                yield Task(kind.env_id, 0, kind.options), idle.get_nowait()

    async def _new(self, kind: ReplicaKind) -> Replica:
        replica = await self._made(kind)
        self._alive[kind] += 1
        self._kinds[replica] = kind
        return replica

    async def _made(self, kind: ReplicaKind) -> Replica:
        env_id = kind.env_id
        task, (host, parts, _) = Task(env_id, 0, kind.options), self._of((env_id, kind.options))
        if env_id == PROGRAM:
            return self._foreign.replica(task.kwargs, host, kind.own_process)
        recipe = registry.env_factory if self._make is registry.make else partial(partial, self._make)
        made = wrapping(recipe(env_id, **task.kwargs), evaluated(parts) if kind.evaluation else parts)
        if self._is_inline(env_id, host) and not (kind.own_process and _can_be_carried(made)):
            ours = self._make is registry.make
            if ours or host.where == "inline":
                immediate = ours and not parts and registry.is_immediate(env_id)
                return await InProcessEnv.start(made, host, self._calls, immediate)
            return InProcessEnv(made())
        async with self._starting:
            return await (self._start if host.where == "ray" else SubprocessEnv.start)(made, host)

    def _is_inline(self, env_id: str, host: HostSettings) -> bool:
        if host.where == "auto":
            return self._make is not registry.make or registry.is_trusted(env_id)
        return host.where == "inline"

    # On a cluster replicas claim resources, which may suffice for fewer replicas than episodes when a node was lost.

    async def _new_or_returned(self, kind: ReplicaKind) -> Replica:
        """Return a new replica, or one that is returned to the pool while there are no resources for a new one.

        Raises ClusterFull if no replica of this kind exists. A replica is in use for one episode at most.
        """
        for other, replica in self._all_idle():  # of other kinds: closing one frees its resources
            await self.discard(other, replica)
            break
        while True:
            try:
                return await self._whichever_is_first(kind)
            except ClusterFull as error:
                alive = self._alive[kind]
                if not alive:
                    raise
                log.warning("a replica of %s: %s; episodes take turns on %d", kind.env_id, error, alive)

    async def _whichever_is_first(self, kind: ReplicaKind) -> Replica:
        idle = self._idle[kind]
        returned, new = asyncio.create_task(idle.get()), asyncio.create_task(self._new(kind))
        chosen: asyncio.Task[Replica] | None = None

        def keep(other: asyncio.Task[Replica]) -> None:
            if not other.cancelled() and not other.exception():  # it succeeded before it was cancelled
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
    """Whether another process can make it, that is, whether it can be pickled."""
    try:
        pickle.dumps(made)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        log.warning("a replica runs inline although a worker was lost with one like it: %s", error)
        return False
    return True
