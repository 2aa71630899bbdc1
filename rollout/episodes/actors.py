"""A rollout worker as a Ray actor: a thin shell that builds a `RolloutWorker` where it runs."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pyarrow as pa
import ray
import ray._private.worker

from rollout.buffer.actors import RemoteReplayBuffer
from rollout.buffer.replay_store import EpisodeRow
from rollout.engines.engine import NativeTransfer
from rollout.episodes.loop_watch import LoopWatch
from rollout.episodes.worker import RolloutWorker, as_groups
from rollout.wire.notices import collected
from rollout.wire.process_info import ProcessInfo, here
from rollout.wire.schema import encode
from rollout.wire.stacks import stacks
from rollout.wire.trajectory import Task
from rollout.wire.weights import SyncReport, WeightManifest, WeightUpdate

BuildWorker = Callable[[str, Any], Awaitable[RolloutWorker]]

BESIDE = (
    "beside"  # a concurrency group of its own, whose calls are answered where the actor's event loop stands
)
GROUPS = {BESIDE: 4}
_STACKS_SECONDS = 20.0  # of a standing loop, until the log has all stacks

LEAVE_SECONDS = 60.0  # from SIGTERM to the end of the process, whatever the replay buffer and the engine do

log = logging.getLogger(__name__)


class RolloutActor:
    """`build(name, buffer)` makes the worker; nothing of it exists before `start`.

    SIGTERM to the actor's process makes it leave: turns that are being sampled end, what is finished is durable, its
    groups wait for other workers, and the process ends.
    """

    def __init__(self, name: str, replay_buffer: Any, build: BuildWorker) -> None:
        self._name = name
        self._replay_buffer = RemoteReplayBuffer(replay_buffer)
        self._build = build
        self._worker: RolloutWorker | None = None
        self._leaving: asyncio.Task[None] | None = None
        # An asyncio actor is made on its event loop.
        loop = asyncio.get_running_loop()
        self._watch = LoopWatch(_STACKS_SECONDS)
        _on_sigterm(lambda: loop.call_soon_threadsafe(self._begin_to_leave))

    async def start(self) -> ProcessInfo:
        """Start the engine; returns where this actor runs."""
        self._worker = await self._build(self._name, self._replay_buffer)
        # Not before: what an engine's start holds up is no episode.
        self._notices = collected()
        return here(ray.get_runtime_context().get_node_id())

    async def ping(self) -> dict[str, float]:
        """The worker's heartbeat: this event loop has answered, and so has the engine. Raises EngineDied."""
        worker = self._started()
        await worker.engine.ping()
        return worker.heartbeat()

    async def notices(self, heard: int) -> list[str]:
        """What this process has noticed after the first `heard` notices, see `rollout.wire.notices`."""
        self._started()
        return self._notices.since(heard)

    async def standing(self) -> str:
        """How long the event loop has stood and where; empty while it goes on. To be asked in the group `BESIDE`."""
        return self._watch.standing()

    async def stacks(self) -> str:
        """What every thread and task of this process is doing."""
        return stacks()

    async def drain(self) -> None:
        """Reserve nothing more, let running turns end, and return when all turns are durable; `run` ends then."""
        await self._started().drain()

    async def stop(self) -> None:
        """`drain` without waiting for running turns; `run` may be called again when nothing is held any more."""
        await self._started().stop()

    async def run(self) -> None:
        """Play groups until the replay buffer says that the run is over."""
        await self._started().run()

    async def evaluate(self, tasks: Sequence[Task], name: str) -> list[EpisodeRow]:
        """Play one episode a task; the rows go to the store under `name`, the outcomes to the caller."""
        trajectories = await self._started().evaluate(tasks)
        await self._replay_buffer.archive(name, [encode(group) for group in as_groups(trajectories)])
        return [EpisodeRow.of(trajectory) for trajectory in trajectories]

    async def sync(self, update: WeightUpdate) -> SyncReport:
        """Load one version and prove it."""
        return await self._started().engine.sync(update)

    # A sync in steps, for vLLM's native transfers: `NativePublisher` drives them.

    async def open_transfer(self, init_info: dict[str, Any]) -> None:
        await self._native().open_transfer(init_info)

    async def begin_update(self, manifest: WeightManifest) -> None:
        await self._native().begin_update(manifest)

    async def receive(self, update_info: Any) -> None:
        await self._native().receive(update_info)

    async def finish_update(self, manifest: WeightManifest) -> SyncReport:
        return await self._native().finish_update(manifest)

    async def counters(self) -> dict[str, float]:
        return self._started().counters()

    async def close(self) -> None:
        if self._worker is not None:
            await self._worker.close()
            await self._worker.engine.close()

    def _begin_to_leave(self) -> None:
        if self._leaving is None:
            self._leaving = asyncio.create_task(self._leave(), name=f"{self._name} leaves")

    async def _leave(self) -> None:
        try:
            async with asyncio.timeout(LEAVE_SECONDS):
                if self._worker is not None:
                    await self._worker.drain()
                    await self._replay_buffer.reassign(self._name)
                await self.close()
        except Exception:  # the process ends in any case; why it did not leave in order is for its log
            log.exception("rollout worker %s left without handing on all it had", self._name)
        finally:
            os._exit(0)

    def _started(self) -> RolloutWorker:
        if self._worker is None:
            raise RuntimeError(f"rollout worker {self._name} was used before start()")
        return self._worker

    def _native(self) -> NativeTransfer:
        engine = self._started().engine
        if not isinstance(engine, NativeTransfer):
            raise RuntimeError(
                f"rollout worker {self._name} has an engine without native transfers: use "
                "weights.transfer='object_store'"
            )
        return engine


def _on_sigterm(ask: Callable[[], object]) -> None:
    """Have `ask` called in the main thread when this process gets SIGTERM.

    Ray 2.60 keeps the main thread, where alone a handler can be set, and has set one that raises SystemExit through the
    name replaced here; an asyncio actor with a call under way never ends by that.
    """

    def asked(message: str, exit_code: int = 1) -> None:
        ask()

    ray._private.worker.raise_sys_exit_with_custom_error_message = asked


@ray.remote
def demonstrate(play: Callable[[], list[pa.RecordBatch]]) -> list[pa.RecordBatch]:
    """Play demonstrations somewhere in the cluster; the rows stay in the object store."""
    return play()
