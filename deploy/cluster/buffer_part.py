"""The replay buffer as a supervised part: an actor with heartbeats that Ray restarts from disk when it dies."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

import ray
from ray.exceptions import RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from deploy.assembly.runtime import loss_to_come
from deploy.cluster.ray_actors import actor, awaited
from deploy.config.config import ClusterSettings
from deploy.config.supervise import PartFailed, PartLost, SupervisionSettings, brief, place, within
from deploy.report.noticed import Noticed
from rollout.buffer.actors import ReplayBufferActor
from rollout.buffer.replay_buffer import ReplayBuffer
from rollout.wire.process_info import ProcessInfo

CLOSE_SECONDS = 30.0  # limit for closing the ledger


class BufferPart:
    """The replay buffer's actor: Ray restarts it (max_restarts) and repeats its pending calls (max_task_retries).

    cluster: has the limit for an answer, and the resources that its node must have. noticed: receives the actor's
    notices. note: called with the process and the error of every loss. `lost` fails with PartFailed when Ray cannot
    restart it.
    """

    def __init__(
        self,
        build: Callable[[], ReplayBuffer],
        supervision: SupervisionSettings,
        cluster: ClusterSettings,
        say: Callable[[str], None],
        noticed: Noticed,
        note: Callable[[ProcessInfo | None, BaseException], None],
    ) -> None:
        self._settings, self._say, self._noticed, self._note = supervision, say, noticed, note
        self._seconds = cluster.start_timeout_seconds
        self.where: ProcessInfo | None = None
        self.lost = loss_to_come()
        restarts: dict[str, Any] = {"max_restarts": supervision.max_restarts, "max_task_retries": -1}
        # Every loop of every worker may be waiting for a slot; other calls need capacity beside them.
        options = restarts | {"max_concurrency": 100_000} | _placement(cluster.buffer_resources)
        self.handle = actor(ReplayBufferActor, **options).remote(build)

    async def find(self) -> None:
        """Wait until the actor answers, and store where it runs. PartLost if it does not answer in time."""
        self.where = await self.answer("ping")

    async def answer(self, method: str, *arguments: Any, limit: float | None = None, **named: Any) -> Any:
        """What a method of the actor returns; PartLost if it does not within the limit (seconds)."""
        answer = getattr(self.handle, method).remote(*arguments, **named)
        return await within(limit or self._seconds, awaited(answer), "the replay buffer")

    async def watch(self) -> None:
        """Send heartbeats until the actor is lost for good."""
        # Without retries these calls fail at once while Ray restarts the actor.
        ping, notices = (m.options(max_task_retries=0) for m in (self.handle.ping, self.handle.notices))
        limit, what = self._settings.heartbeat_timeout_seconds, "the replay buffer (heartbeat)"
        while True:
            await asyncio.sleep(self._settings.heartbeat_interval_seconds)
            try:
                where = await within(limit, awaited(ping.remote()), what)
                self._noticed.hear("replay buffer", await within(limit, awaited(notices.remote()), what))
                if where != self.where:  # it died and came back between two heartbeats
                    self._note(self.where, PartLost("it came back between two heartbeats"))
                    self.where = where
                    self._say(f"the replay buffer was lost and has restarted from disk ({place(where)})")
            except (PartLost, RayActorError) as error:
                if isinstance(error, PartLost):
                    ray.kill(self.handle, no_restart=False)
                if not await self._is_back(error):
                    return

    async def _is_back(self, loss: Exception) -> bool:
        """Wait until Ray has restarted the actor; beyond max_restarts, or without an answer, the run stops."""
        self._say(f"the replay buffer is lost ({brief(loss)}); it restarts from disk")
        self._note(self.where, loss)
        try:
            await self.find()
        except (PartLost, RayActorError) as error:
            most, where = self._settings.max_restarts, place(self.where)
            failure = f"the replay buffer could not be restarted (supervision.max_restarts={most}); {where}; "
            self.lost.set_exception(PartFailed(f"{failure}the last error: {brief(error)}"))
            return False
        return True

    async def close(self) -> None:
        """Let the ledger close, then end the actor."""
        closing = asyncio.ensure_future(awaited(self.handle.close.remote()))
        await asyncio.wait({closing}, timeout=CLOSE_SECONDS)
        if closing.done() and (error := closing.exception()):
            self._say(f"the replay buffer did not close cleanly: {brief(error)}")
        ray.kill(self.handle)


def _placement(resources: Mapping[str, float]) -> dict[str, Any]:
    """Ray's options for where the actor runs, at its start and whenever it is started again."""
    if resources:  # every node that has them can restore the state from its copy
        return {"resources": dict(resources)}
    # Without a copy the state is in the run folder of this host, and a second writer elsewhere would not be noticed.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return {"scheduling_strategy": here}
