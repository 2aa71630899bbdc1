"""The replay buffer as the ring has it: an actor that Ray starts again from disk when it dies, and that is watched."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import RayActorError

from deploy.assembly.runtime import loss_to_come
from deploy.cluster.actor_member import actor, awaited
from deploy.config.supervise import PartFailed, PartLost, SupervisionSettings, brief, place, within
from deploy.report.noticed import Noticed
from rollout.buffer.actors import ReplayBufferActor
from rollout.buffer.replay_buffer import ReplayBuffer
from rollout.wire.process_info import ProcessInfo

CLOSE_SECONDS = 30.0  # what the ledger is given to close


class BufferPart:
    """The replay buffer's actor: Ray restarts it (max_restarts) and repeats the calls under way (max_task_retries).

    seconds: limit for an answer. noticed: is told what the actor notices. `lost` fails with PartFailed once Ray does
    not bring it back.
    """

    def __init__(
        self,
        build: Callable[[], ReplayBuffer],
        supervision: SupervisionSettings,
        seconds: float,
        say: Callable[[str], None],
        noticed: Noticed,
    ) -> None:
        self._settings, self._seconds, self._say, self._noticed = supervision, seconds, say, noticed
        self.where: ProcessInfo | None = None
        self.lost = loss_to_come()
        restarts: dict[str, Any] = {"max_restarts": supervision.max_restarts, "max_task_retries": -1}
        # Every loop of every worker may wait for a slot; others' calls must find a place beside them.
        self.handle = actor(ReplayBufferActor, max_concurrency=100_000, **restarts).remote(build)

    async def find(self) -> None:
        """Wait until it answers, and note where it runs. PartLost where it does not in time."""
        self.where = await self.within(self.handle.ping.remote())

    async def within(self, answer: Any, limit: float | None = None) -> Any:
        """One of its answers; PartLost where it does not come within the limit (seconds)."""
        return await within(limit or self._seconds, awaited(answer), "the replay buffer")

    async def watch(self) -> None:
        """Ask for a heartbeat until it is lost for good."""
        # They fail at once while Ray starts the actor again.
        ping, notices = (m.options(max_task_retries=0) for m in (self.handle.ping, self.handle.notices))
        while True:
            await asyncio.sleep(self._settings.heartbeat_seconds)
            try:
                answer = awaited(ping.remote())
                where = await within(self._settings.frozen_seconds, answer, "the replay buffer (heartbeat)")
                self._noticed.hear(
                    "replay buffer", await self.within(notices.remote(), self._settings.frozen_seconds)
                )
                if where != self.where:  # it died and came back between two heartbeats
                    self.where = where
                    self._say(
                        f"the replay buffer was lost and is back, started again from disk ({place(where)})"
                    )
            except (PartLost, RayActorError) as error:
                if isinstance(error, PartLost):
                    ray.kill(self.handle, no_restart=False)
                if not await self._is_back(error):
                    return

    async def _is_back(self, loss: Exception) -> bool:
        """Wait for Ray to have started it again; beyond its restarts, or when it does not come up, the run stops."""
        self._say(f"the replay buffer is lost ({brief(loss)}); it is started again from disk")
        try:
            await self.find()
        except (PartLost, RayActorError) as error:
            most, where = self._settings.max_restarts, place(self.where)
            failure = (
                f"the replay buffer could not be started again (supervision.max_restarts={most}); {where}; "
            )
            self.lost.set_exception(PartFailed(f"{failure}the last error: {brief(error)}"))
            return False
        return True

    async def close(self) -> None:
        """Let the ledger close, then end the actor."""
        closing = asyncio.ensure_future(awaited(self.handle.close.remote()))
        await asyncio.wait({closing}, timeout=CLOSE_SECONDS)
        if closing.done() and (error := closing.exception()):
            self._say(f"the replay buffer at its end: {brief(error)}")
        ray.kill(self.handle)
