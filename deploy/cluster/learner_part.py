"""The learner as one supervised part of one or several ranks. When a rank is lost, all restart together.

Ranks are plain actors. A loss is detected as for every other part: calls fail, or a heartbeat is not answered. Recovery
is the run's: its ledger rolls back to the checkpoint from which the ranks continue.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from deploy.assembly.runtime import LearnerLost
from deploy.cluster.ray_actors import actor, awaited
from deploy.config.config import RunConfig
from deploy.config.resources import rank_claims, rank_gpus
from deploy.config.supervise import Budget, PartLost, SupervisionSettings, TimeLimits, brief, place, within
from deploy.report.noticed import Hear
from learner.parallel.ranks import RankLost, Ranks
from learner.training.actors import Build, FollowerActor, LearnerActor
from learner.training.learner import Learner
from learner.training.loop import Published, Row
from learner.training.publish import Publisher
from rollout.buffer.actors import RemoteReplayBuffer
from rollout.wire.partition import StepTorn
from rollout.wire.process_info import ProcessInfo
from rollout.wire.weights import SyncReport

# glibc's malloc keeps what is freed for the next step. Otherwise every large tensor is memory that the kernel maps,
# clears page by page and takes back: a fifth of a step on CPUs. One arena, since a step may run in any thread.
KEEPS_MEMORY = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(2**31),
    "MALLOC_TRIM_THRESHOLD_": str(2**31),
}


class LearnerPart:
    """Rank 0's actor, which receives every call, and the actors of the other ranks, which rank 0 calls.

    Calls raise LearnerLost where a rank died, and PartLost where rank 0 does not answer in time.

    The placement group of several ranks is kept over restarts, so that a restart never waits for resources.
    """

    def __init__(
        self,
        config: RunConfig,
        build: Build,
        replay_buffer: RemoteReplayBuffer,
        limits: TimeLimits,
        make_native: Callable[[Learner], Publisher] | None = None,
        published: Published | None = None,
    ) -> None:
        self._config = config
        self._build = build
        self._replay_buffer = replay_buffer
        self._limits = limits
        self._make_native = make_native
        self._published = published
        self._room: Any = None
        self._handles: list[Any] = []
        self.where: dict[str, ProcessInfo] = {}  # process of each rank, by name

    @property
    def lead(self) -> Any:
        """The handle of rank 0's actor."""
        return self._handles[0]

    async def start(self, run_folder: Path, load: bool) -> int:
        """Start every rank, with `load` from the newest checkpoint; returns the version. PartLost names a late rank."""
        limit, size = self._limits.start, self._config.learner.ranks
        options = await self._options(limit, size)
        common = (
            self._build,
            self._replay_buffer,
            self._config.engine.dtype,
            self._config.cluster.step_timeout_seconds,
        )
        followers = [actor(FollowerActor, **each).remote(*common) for each in options[1:]]
        keep = self._config.checkpoint.keep
        lead = actor(LearnerActor, **options[0]).remote(
            *common, keep, self._make_native, followers, self._config.policy, self._published
        )
        self._handles = [lead, *followers]
        joins: list[Callable[[], Ranks]] = [Ranks]
        if size > 1:
            address = await within(limit, awaited(lead.open.remote(size, limit)), "the learner's rank 0")
            device = self._config.learner.model.device
            # Ranks wait for one another while one of them writes a checkpoint, too.
            seconds = max(self._config.cluster.step_timeout_seconds, self._limits.save)
            settings = self._config.learner
            words = size, address, device, seconds, settings.sharded_over, settings.context_parallel_size
            joins = [partial(Ranks.join, rank, *words) for rank in range(size)]
        starts = [
            within(limit, awaited(handle.start.remote(run_folder, load, join)), f"the {name} (start)")
            for name, handle, join in zip(self._names, self._handles, joins, strict=True)
        ]
        started = await asyncio.gather(*starts)
        self.where = dict(zip(self._names, (where for where, _ in started), strict=True))
        return int(started[0][1])

    async def begin_stage(self, index: int, rows: Any) -> tuple[int, int]:
        """Begin a stage; rows: a reference to its data."""
        what, limit = f"the data of stage {index}", self._config.cluster.start_timeout_seconds
        made, steps = await self._answer(what, limit, "begin_stage", index, rows)
        return int(made), int(steps)

    async def advance_stage(self, steps: int) -> list[Row]:
        """Make up to so many steps of the stage."""
        limit = steps * self._config.cluster.step_timeout_seconds
        return list(await self._answer("steps of a stage", limit, "advance_stage", steps))

    async def train(self, number: int, others: bool = True) -> Row:
        """Make a step; see `LearnerLoop.train`."""
        # The learner waits one step_timeout_seconds for its groups and names the missing ones; the step has another.
        limit = 2 * self._config.cluster.step_timeout_seconds
        return dict(await self._answer("the learner's step", limit, "train", number, others))

    async def send(self, members: Mapping[str, Any]) -> list[SyncReport]:
        """Send the version to these rollout actors, by name, by vLLM's own transfer."""
        limit = self._limits.publish + self._limits.sync
        return list(await self._answer("the weight sync", limit, "publish_native", members))

    async def copy(self, run_folder: Path) -> None:
        """Copy what a checkpoint of the version will hold."""
        await self._answer("the learner (copy)", self._limits.save, "copy", run_folder)

    async def save(self, run_folder: Path) -> None:
        """Begin a checkpoint, once the one before has landed."""
        await self._answer("the checkpoint", self._limits.save, "save", run_folder)

    async def landed(self) -> None:
        """Wait until the last checkpoint is on disk."""
        await self._answer("the checkpoint", self._limits.save, "landed")

    async def onload(self) -> None:
        """Bring the state back to the device."""
        await self._answer("the learner (onload)", self._limits.publish, "onload")

    async def offload(self) -> None:
        """Move the state to host memory."""
        await self._answer("the learner (offload)", self._limits.publish, "offload")

    async def _answer(self, what: str, limit: float, method: str, *arguments: Any) -> Any:
        """What a method of rank 0 returns within the limit, seconds."""
        try:
            return await within(limit, awaited(getattr(self.lead, method).remote(*arguments)), what)
        except (RayActorError, RankLost, StepTorn) as error:
            raise LearnerLost(self.loss_message(error)) from error

    async def restarted(
        self, loss: Exception, budget: Budget, say: Callable[[str], None], start: Callable[[], Awaitable[int]]
    ) -> int:
        """Start all ranks again, as often as the budget allows: a node that is being lost may be given its actors."""
        while True:
            budget.spend("learner", self.where.get("learner"), loss)
            say(f"{loss}; it starts again from its newest checkpoint")
            self.kill()
            try:
                return await start()
            except (RayActorError, PartLost, RankLost) as error:
                loss = LearnerLost(self.loss_message(error))

    async def lost(self, settings: SupervisionSettings, hear: Hear) -> str:
        """Send heartbeats until a rank does not answer; returns the message with its name, process and error.

        hear: receives the notices of each rank.
        """
        while True:
            await asyncio.sleep(settings.heartbeat_interval_seconds)
            beats = [
                within(
                    settings.heartbeat_timeout_seconds, _beat(name, handle, hear), f"the {name} (heartbeat)"
                )
                for name, handle in zip(self._names, self._handles, strict=True)
            ]
            for name, answer in zip(
                self._names, await asyncio.gather(*beats, return_exceptions=True), strict=True
            ):
                if isinstance(answer, RayActorError | PartLost):
                    return self.loss_message(answer, name)
                if answer is not None:
                    raise answer

    def loss_message(self, error: BaseException, name: str = "learner") -> str:
        """The message that a rank is lost, one line."""
        return f"the {name} is lost ({place(self.where.get(name))}): {brief(error)}"

    def kill(self) -> None:
        """Kill every rank; the placement group stays."""
        for handle in self._handles:
            ray.kill(handle)

    def close(self) -> None:
        """Kill every rank and free the placement group."""
        self.kill()
        if self._room is not None:
            ray.util.remove_placement_group(self._room)

    def apart(self, node: str) -> bool:
        """Whether a worker on this node receives weights as deltas: it is another one than rank 0's."""
        return self._config.weights.delta and bool(node) and node != self.where["learner"].node

    @property
    def handles(self) -> dict[str, Any]:
        """The actor of each rank, by name."""
        return dict(zip(self._names, self._handles, strict=True))

    @property
    def _names(self) -> list[str]:
        return ["learner", *(f"learner-{rank}" for rank in range(1, len(self._handles)))]

    async def _options(self, limit: float, size: int) -> list[dict[str, Any]]:
        """Resources and placement of each rank's actor."""
        claims = rank_claims(self._config) | {"GPU": rank_gpus(self._config)}
        own = self._config.cluster.learner_resources
        options: dict[str, Any] = {"num_cpus": claims["CPU"], "num_gpus": claims["GPU"], "resources": own}
        if self._config.learner.model.device == "cpu":
            # Read by the C library when the process starts.
            options["runtime_env"] = {"env_vars": {n: os.environ.get(n, v) for n, v in KEEPS_MEMORY.items()}}
        bundle = {name: amount for name, amount in claims.items() if amount}
        if size == 1 or not bundle:
            return [options] * size
        if self._room is None:
            self._room = ray.util.placement_group([bundle] * size, strategy="PACK")
            await within(
                limit, awaited(self._room.ready()), f"the placement group of the learner's {size} ranks"
            )
        nodes = ray.util.placement_group_table(self._room)["bundles_to_node_id"]
        # Ranks of one node are consecutive: parameters are sharded over neighbours.
        bundles = sorted(range(size), key=lambda bundle: (str(nodes[bundle]), bundle))
        places = [PlacementGroupSchedulingStrategy(self._room, bundle) for bundle in bundles]
        return [options | {"scheduling_strategy": where} for where in places]


async def _beat(name: str, handle: Any, hear: Hear) -> None:
    await handle.ping.remote()
    hear(name, await handle.notices.remote())
