"""A rollout worker as a Ray actor, which builds its `RolloutWorker` where it runs."""

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
from rollout.engines.engine import NativeTransfer, SleepLevel, sleeping
from rollout.episodes.evaluation import EvaluationPlan, as_groups, evaluation_row
from rollout.episodes.loop_watch import LoopWatch
from rollout.episodes.worker import RolloutWorker
from rollout.wire.actors import node_file
from rollout.wire.held_version import HeldVersion
from rollout.wire.notices import collected
from rollout.wire.process_info import ProcessInfo, here, stacks
from rollout.wire.schema import encode
from rollout.wire.trajectory import Task
from rollout.wire.verdicts import Verdicts
from rollout.wire.weights import SyncReport, WeightManifest, WeightUpdate

BuildWorker = Callable[[str, Any], Awaitable[RolloutWorker]]

BESIDE = "beside"  # concurrency group whose calls are answered even while the actor's event loop is blocked
GROUPS = {BESIDE: 4}
_STACKS_AFTER_SECONDS = 20.0  # of a standing loop, until the log has all stacks

LEAVE_TIMEOUT_SECONDS = 60.0  # from SIGTERM to the end of the process, at most

log = logging.getLogger(__name__)


class RolloutActor:
    """One rollout worker. build: called with (name, buffer) by `start`, creates the worker.

    On SIGTERM to its process the actor leaves: turns that are being sampled end, finished turns are durable, its groups
    wait for other workers, and the process ends.
    """

    def __init__(self, name: str, replay_buffer: Any, build: BuildWorker) -> None:
        self._name = name
        self._replay_buffer = RemoteReplayBuffer(replay_buffer)
        self._build = build
        self._worker: RolloutWorker | None = None
        self._held, self._verdicts = HeldVersion(node_file("versions")), Verdicts(node_file("verdicts"))
        self._leaving: asyncio.Task[None] | None = None
        # An asyncio actor is made on its event loop.
        loop = asyncio.get_running_loop()
        self._watch = LoopWatch(_STACKS_AFTER_SECONDS)
        _on_sigterm(lambda: loop.call_soon_threadsafe(self._begin_to_leave))

    async def start(self) -> ProcessInfo:
        """Start the engine; returns where this actor runs."""
        self._worker = await self._build(self._name, self._replay_buffer)
        # After the start: while an engine starts, the loop may be blocked, and no episode waits.
        self._notices = collected()
        return here(ray.get_runtime_context().get_node_id())

    async def ping(self) -> dict[str, float]:
        """Heartbeat: this event loop and the engine have answered. Raises EngineDied."""
        worker = self._started()
        await worker.engine.ping()
        return worker.heartbeat()

    async def notices(self, heard: int) -> list[str]:
        """Notices of this process after the first `heard`, see `rollout.wire.notices`."""
        self._started()
        return self._notices.since(heard)

    async def standing(self) -> str:
        """For how long the event loop has been blocked and where; empty if it is not. Call it in the group `BESIDE`."""
        return self._watch.standing()

    async def stacks(self) -> str:
        """Stacks of all threads and tasks of this process."""
        return stacks()

    async def drain(self) -> None:
        """Stop reserving groups, let running turns end, and return when all turns are durable; `run` then ends."""
        await self._started().drain()

    async def stop(self) -> None:
        """`drain` without waiting for running turns; `run` may be called again once the worker's leases have ended."""
        await self._started().stop()

    async def run(self) -> None:
        """Play groups until the replay buffer has no more of them."""
        await self._started().run()

    async def evaluate(self, tasks: Sequence[Task], name: str, plan: EvaluationPlan) -> list[EpisodeRow]:
        """Play the tasks by the plan; stores the rows under `name`, and returns the outcomes."""
        trajectories = await self._started().evaluate(tasks, plan)
        await self._replay_buffer.archive(
            name, [encode(group) for group in as_groups(trajectories, self._started().policy)]
        )
        return [evaluation_row(trajectory, plan.majority) for trajectory in trajectories]

    async def sync(self, update: WeightUpdate, hold: bool = False) -> SyncReport:
        """Load one version and verify it. hold: from this node's copy, to which deltas are applied."""
        worker = self._started()
        if not hold:
            return await worker.sync(await asyncio.to_thread(self._verdicts.verified, update))
        try:
            return await worker.sync(await asyncio.to_thread(self._held.receive, update))
        finally:
            self._held.loaded()

    async def sleep(self, level: SleepLevel) -> None:
        """Have the engine give up its memory until the next `sync`."""
        await sleeping(self._started().engine).sleep(level)

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
            async with asyncio.timeout(LEAVE_TIMEOUT_SECONDS):
                if self._worker is not None:
                    await self._worker.drain()
                    await self._replay_buffer.reassign(self._name)
                await self.close()
        except Exception:  # the process ends in any case; its log gets the reason
            log.exception("rollout worker %s left without recording all its turns", self._name)
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
    """Call `ask` in the main thread when this process gets SIGTERM.

    Handlers can be set in the main thread only, which Ray 2.60 occupies. Ray's own handler raises SystemExit through
    the function replaced here, and that does not end an asyncio actor with a call under way.
    """

    def asked(message: str, exit_code: int = 1) -> None:
        ask()

    ray._private.worker.raise_sys_exit_with_custom_error_message = asked


@ray.remote
def demonstrate(play: Callable[[], list[pa.RecordBatch]]) -> list[pa.RecordBatch]:
    """Play demonstrations somewhere in the cluster; the rows stay in the object store."""
    return play()
