"""The learner as Ray actors, one a rank; its versions lie in Ray's object store."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from operator import methodcaller
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
from ray.exceptions import RayActorError

from learner.parallel.ranks import RankLost, Ranks, Rendezvous
from learner.training.follower import Follower
from learner.training.learner import Learner
from learner.training.loop import LearnerLoop, Published, Row, Source, Tell
from learner.training.publish import Publisher
from rollout.wire.actors import put_object
from rollout.wire.notices import collected
from rollout.wire.policies import POLICY
from rollout.wire.process_info import ProcessInfo, here, stacks
from rollout.wire.weights import Handle, SyncReport, WeightUpdate

Build = Callable[[Ranks], Learner]  # makes the learner where the actor runs
Join = Callable[[], Ranks]  # meets the other ranks


class LearnerActor:
    """Rank 0, which is all there is of most learners. `followers` are the actors of the other ranks, in order.

    `make_native(learner)` gives it vLLM's own transfer, for a run whose weights travel that way. `published` is called
    with each version before engines are offered it.
    """

    def __init__(
        self,
        build: Build,
        replay_buffer: Source,
        engine_dtype: str,
        take_seconds: float,
        keep_checkpoints: int,
        make_native: Callable[[Learner], Publisher] | None = None,
        followers: Sequence[Any] = (),
        policy: str = POLICY,
        published: Published | None = None,
    ) -> None:
        self._build = build
        self._replay_buffer = replay_buffer
        self._settings = engine_dtype, take_seconds, keep_checkpoints
        self._make_native = make_native
        self._tell = _teller(followers)
        self._policy, self._published = policy, published
        self._notices = collected()

    async def open(self, ranks: int, seconds: float) -> str:
        """Open a place where ranks meet, on this node's address within the cluster; returns host:port."""
        self._rendezvous = Rendezvous(ray.util.get_node_ip_address(), ranks, seconds)
        return self._rendezvous.address

    async def start(self, run_folder: Path, resume: bool, join: Join) -> tuple[ProcessInfo, int]:
        """Meet the others, and load the newest checkpoint when resuming; returns where this is, and its version."""
        self._learner = _started(self._build, run_folder, resume, join)
        native = self._make_native(self._learner) if self._make_native else None
        self._loop = LearnerLoop(
            self._learner,
            self._replay_buffer,
            put_object,
            *self._settings,
            native,
            self._tell,
            self._policy,
            self._published,
        )
        return _here(), self._learner.version

    async def begin_stage(self, index: int, batches: list[pa.RecordBatch]) -> tuple[int, int]:
        return await self._loop.begin_stage(index, batches)

    async def advance_stage(self, steps: int) -> list[Row]:
        return await self._loop.advance_stage(steps)

    async def train(self, step: int, others: bool = True) -> Row:
        return await self._loop.train(step, others)

    async def publish_weights(self, delta: bool = False) -> WeightUpdate:
        return await self._loop.publish_weights(delta)

    async def unpin_weights(self, version: int, handle: Handle) -> None:
        await self._loop.unpin_weights(version, handle)

    async def publish_native(self, workers: Mapping[str, Any]) -> list[SyncReport]:
        return await self._loop.publish_native(workers)

    async def save(self, run_folder: Path) -> None:
        await self._loop.save(run_folder)

    async def landed(self) -> None:
        await self._loop.landed()

    async def copy(self, run_folder: Path) -> None:
        await self._loop.copy(run_folder)

    async def offload(self) -> int:
        return await self._loop.offload()

    async def onload(self) -> int:
        return await self._loop.onload()

    async def ping(self) -> None:
        """Answers while the event loop does; a step runs in a thread beside it."""

    async def notices(self) -> list[str]:
        """What this process has noticed, see `rollout.wire.notices`."""
        return self._notices.since(0)

    async def stacks(self) -> str:
        """What every thread and task of this process is doing."""
        return stacks()


class FollowerActor:
    """Any other rank: rank 0's actor tells it what to do."""

    def __init__(self, build: Build, replay_buffer: Source, engine_dtype: str, take_seconds: float) -> None:
        self._build = build
        self._replay_buffer = replay_buffer
        self._settings = engine_dtype, take_seconds
        self._notices = collected()

    async def start(self, run_folder: Path, resume: bool, join: Join) -> tuple[ProcessInfo, int]:
        """As rank 0's."""
        learner = _started(self._build, run_folder, resume, join)
        self._follower = Follower(learner, self._replay_buffer, *self._settings)
        return _here(), learner.version

    async def follow(self, verb: str, *words: Any) -> None:
        """One of `Follower`'s verbs."""
        await methodcaller(verb, *words)(self._follower)

    async def ping(self) -> None:
        """Answers while the event loop does."""

    async def notices(self) -> list[str]:
        """What this process has noticed, see `rollout.wire.notices`."""
        return self._notices.since(0)

    async def stacks(self) -> str:
        """What every thread and task of this process is doing."""
        return stacks()


def _started(build: Build, run_folder: Path, resume: bool, join: Join) -> Learner:
    learner = build(join())
    if resume:
        learner.load(run_folder)
    learner.keep_advantages(run_folder)
    return learner


def _teller(followers: Sequence[Any]) -> Tell:
    def tell(verb: str, *words: Any) -> list[Awaitable[None]]:
        told = [follower.follow.remote(verb, *words) for follower in followers]
        return [_answer(rank, reference) for rank, reference in enumerate(told, 1)]

    return tell


async def _answer(rank: int, reference: Any) -> None:
    try:
        await reference
    except RayActorError as error:
        raise RankLost(f"rank {rank} of the learner is gone: {str(error).splitlines()[0]}") from error


def _here() -> ProcessInfo:
    return here(ray.get_runtime_context().get_node_id())
