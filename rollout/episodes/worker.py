"""The rollout worker: plays the groups the replay buffer gives out, on one engine.

    while assignment := await buffer.reserve():
        await buffer.add(slot, encode(await run_group(slot, ...)))

`concurrent_groups` such loops (lanes) run at once. Each waits for the replay buffer (a free slot: freed when the
learner's new weights have reached every engine) and for the engine, and for nothing else. Beside them a recorder makes
finished turns durable, so that a group goes on elsewhere when this worker is lost.
"""

from __future__ import annotations

import asyncio
import logging
import traceback
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Protocol

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field

from rollout.agents.agent import Agent
from rollout.buffer.failures import cause_of
from rollout.buffer.replay_store import EpisodeRow
from rollout.engines.engine import Engine, EngineDied, derive_seed
from rollout.episodes.episode import Limits, Place
from rollout.episodes.group import concurrently, play, run_group
from rollout.episodes.pool import EnvironmentPool
from rollout.episodes.recorder import Recorder
from rollout.episodes.rollout_metrics import Recorded, RolloutMetrics
from rollout.wire.schema import encode, restore_turns
from rollout.wire.trajectory import (
    Assignment,
    DropReason,
    EndReason,
    Group,
    Slot,
    StaleSlot,
    Task,
    Trajectory,
)

log = logging.getLogger(__name__)

_EVALUATION = 1  # a third part of the seed: evaluation episodes never share a training episode's sampling


class RolloutSettings(BaseModel):
    """How episodes are played, and by how many workers."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    workers: int = Field(1, gt=0, description="rollout workers, each with an engine of its own")
    cpus_per_worker: float = Field(1.0, ge=0, description="CPUs a worker claims from the cluster")
    gpus_per_worker: float = Field(
        0.0, ge=0, description="GPUs a worker claims from the cluster; 0: engine on CPU"
    )
    group_size: int = Field(8, gt=0, description="sibling episodes of one task")
    concurrent_groups: int = Field(32, gt=0, description="groups one worker plays at the same time")
    dynamic_sampling: bool = Field(
        False,
        description="dynamic sampling: give up a group whose episodes all earned the same, and play another one; for "
        "an advantage that compares these rewards alone",
    )
    context_tokens: int = Field(1024, gt=1, description="longest conversation, prompt and answers, in tokens")
    max_turns: int = Field(100, gt=0, description="turns after which an episode is truncated")
    episode_seconds: float = Field(
        600.0,
        gt=0,
        description="wall clock after which an episode has failed; its waits for room to run an environment's call "
        "do not count",
    )

    @property
    def limits(self) -> Limits:
        return Limits(self.max_turns, self.episode_seconds)

    @property
    def episodes(self) -> int:
        """Episodes that a worker plays at the same time."""
        return self.concurrent_groups * self.group_size

    @property
    def needed(self) -> int:
        """Episodes that must survive infrastructure failures: a baseline needs a sibling."""
        return min(self.group_size, 2)


class GroupBuffer(Protocol):
    """What a worker needs of the replay buffer, local or remote."""

    async def reserve(self, worker: str, lane: int) -> Assignment | None: ...

    async def record_turns(self, batch: pa.RecordBatch) -> None: ...

    async def add(self, slot: Slot, batch: pa.RecordBatch, episodes: Sequence[EpisodeRow]) -> None: ...

    async def drop(
        self, slot: Slot, reason: DropReason, error: str = "", episodes: Sequence[EpisodeRow] = ()
    ) -> None: ...


class RolloutWorker:
    """Engine, agent and environments under one name. The engine is the agent's; whoever hosts the worker syncs it."""

    def __init__(
        self,
        name: str,
        engine: Engine,
        agent: Agent,
        replay_buffer: GroupBuffer,
        settings: RolloutSettings,
        run_seed: int,
        pool: EnvironmentPool | None = None,
    ) -> None:
        self.name = name
        self.engine = engine
        self._agent = agent
        self._replay_buffer = replay_buffer
        self._settings = settings
        self._run_seed = run_seed
        self._pool = EnvironmentPool() if pool is None else pool
        self._tally = RolloutMetrics()
        self._recorder = Recorder(replay_buffer, name)
        self._watch = Recorded(self._tally, self._recorder)
        self._groups: Counter[str] = Counter()
        self._asking: set[asyncio.Future[Assignment | None]] = set()  # lanes that wait for a slot
        self._running: tuple[asyncio.Task[list[None]], asyncio.Task[None]] | None = None  # lanes, recorder
        self._idle = asyncio.Event()  # run() is not under way

    async def run(self) -> None:
        """Play groups until the replay buffer says that the run is over, or until `drain` or `stop`.

        Raises what ends a lane or the recorder (EngineDied, a replay buffer that is gone, a bug of ours) as it is.
        Turns that are finished by then are handed on first, unless the replay buffer itself is what failed. Cancelled,
        it leaves its slots to the ledger.
        """
        if self._running is not None:
            raise RuntimeError(f"{self.name} is running already")
        self._watch.halted = False
        lanes = asyncio.create_task(
            concurrently(self._play_groups(lane) for lane in range(self._settings.concurrent_groups))
        )
        recording = asyncio.create_task(self._recorder.run())
        self._running = lanes, recording
        self._idle.clear()
        try:
            # The recorder ends first by an error alone.
            await asyncio.wait({lanes, recording}, return_when=asyncio.FIRST_COMPLETED)
            if not recording.done():
                self._recorder.finish()
            await recording
        finally:
            lanes.cancel()
            recording.cancel()
            await asyncio.wait({lanes, recording})
            self._running = None
            self._idle.set()
        if not lanes.cancelled():  # as `stop` does, which is no error
            lanes.result()

    async def drain(self, seconds: float = 30.0) -> None:
        """Leave: reserve nothing more, let turns that are being sampled end, and return when all turns are durable.

        Turns that take longer than `seconds` are given up and will be sampled again. The groups stay held. Raises what
        the replay buffer raises.
        """
        self._halt()
        if self._running is not None:
            await asyncio.wait({self._running[0]}, timeout=seconds)
        await self.stop()

    async def stop(self) -> None:
        """`drain` without waiting for turns that are being sampled.

        `run` may be called again once the replay buffer has let go of what this worker holds (`rollback`, `reassign`).
        """
        self._halt()
        if self._running is None:
            return
        lanes, recording = self._running
        lanes.cancel()
        await self._idle.wait()
        if not recording.cancelled():
            recording.result()

    async def evaluate(self, tasks: Sequence[Task]) -> list[Trajectory]:
        """One episode a task, as many at once as training plays, in the order of `tasks`.

        Sampling depends on (run seed, task seed, which repetition of the task) alone, so two evaluations differ by
        the weights only.
        """
        gate = asyncio.Semaphore(self._settings.episodes)
        repetitions: Counter[Task] = Counter()
        places = []
        for task in tasks:
            index = repetitions[task]
            repetitions[task] += 1
            seed = derive_seed(self._run_seed, task.seed, index, _EVALUATION)
            slot = Slot(task.seed, 0, task, self.engine.version)
            places.append(Place(slot, index, seed, self.name, evaluation=True))
        return await concurrently(self._evaluate_one(place, gate) for place in places)

    def counters(self) -> dict[str, float]:
        """Sums since the worker was made.

        engine_seconds is wall time with at least one request in the engine. The rest is told by `RolloutMetrics`.
        """
        return {
            **self._tally.row(),
            "groups": self._groups["played"],
            "groups_dropped": self._groups["dropped"],
            "groups_uniform": self._groups["uniform"],
            "groups_superseded": self._groups["superseded"],
            "engine_seconds": self._agent.engine_clock.seconds,
        }

    def heartbeat(self) -> dict[str, float]:
        """Seconds since a turn last ended, and by how much the event loop was late since the last heartbeat."""
        return {
            "last_turn_seconds": self._tally.seconds_since_turn(),
            "loop_lag": self._recorder.loop_lag(),
        }

    async def close(self) -> None:
        """Close the idle environment replicas; the engine is closed by whoever started it."""
        await self._pool.close()

    def _halt(self) -> None:
        self._watch.halted = True
        for asking in self._asking:
            asking.cancel()

    async def _reserve(self, lane: int) -> Assignment | None:
        asking = asyncio.ensure_future(self._replay_buffer.reserve(self.name, lane))
        self._asking.add(asking)
        try:
            return await asking
        except asyncio.CancelledError:
            if self._watch.halted:
                return None
            raise
        finally:
            self._asking.discard(asking)

    async def _play_groups(self, lane: int) -> None:
        settings = self._settings
        while not self._watch.halted and (assignment := await self._reserve(lane)):
            try:
                group = await run_group(
                    assignment.slot,
                    self._pool,
                    self._agent,
                    settings.group_size,
                    settings.limits,
                    self._run_seed,
                    self.name,
                    self._watch,
                    {} if assignment.turns is None else restore_turns(assignment.turns),
                    apart=assignment.losses > 0,
                )
            except Exception as error:
                if not assignment.losses or isinstance(error, EngineDied):
                    raise
                await self._give_up(assignment.slot, error)
                continue
            if any(trajectory.end_reason is EndReason.CANCELLED for trajectory in group.trajectories):
                return  # halted: whoever gets the group next goes on with its turns
            try:
                await self._hand_over(group)
            except StaleSlot:
                self._groups["superseded"] += 1  # another worker plays it, and hands it in
            # Not before: where the call is cut short, its turns must still be recorded.
            self._recorder.forget(assignment.slot)

    async def _give_up(self, slot: Slot, error: Exception) -> None:
        """Drop a group by which a worker was lost before, and which would cost this one too."""
        told = "".join(traceback.format_exception(error))
        said = "group %d is dropped, the second worker could not play it: %r\n%s"
        log.error(said, slot.group_id, error, told)
        try:
            await self._replay_buffer.drop(slot, DropReason.CRASHED, told)
        except StaleSlot:
            self._groups["superseded"] += 1
        else:
            self._groups["dropped"] += 1
        self._recorder.forget(slot)

    async def _hand_over(self, group: Group) -> None:
        for trajectory in group.trajectories:
            self._note_end(trajectory)
        rows = [EpisodeRow.of(trajectory) for trajectory in group.trajectories]
        if len(group.trainable) < self._settings.needed:
            errors = [trajectory.error for trajectory in group.trajectories if trajectory.error]
            await self._replay_buffer.drop(group.slot, DropReason.FAILED, errors[0] if errors else "", rows)
            self._groups["dropped"] += 1
        elif self._settings.dynamic_sampling and group.uniform:
            await self._replay_buffer.drop(group.slot, DropReason.UNIFORM, "", rows)
            self._groups["uniform"] += 1
        else:
            await self._replay_buffer.add(group.slot, encode(group), rows)
            self._groups["played"] += 1

    async def _evaluate_one(self, place: Place, gate: asyncio.Semaphore) -> Trajectory:
        async with gate:
            trajectory = await play(place, self._pool, self._agent, self._settings.limits, self._tally)
        self._note_end(trajectory)
        return trajectory

    def _note_end(self, trajectory: Trajectory) -> None:
        self._tally.ended(trajectory)
        if trajectory.error:
            log.warning("an episode failed and is left out: %s", cause_of(trajectory.error))


def as_groups(trajectories: Sequence[Trajectory]) -> list[Group]:
    """Evaluation episodes as groups, for storage: the episodes of one task are siblings."""
    siblings: dict[tuple[int, Task], list[Trajectory]] = defaultdict(list)
    for trajectory in trajectories:
        siblings[trajectory.group_id, trajectory.task].append(trajectory)
    return [
        Group(Slot(group_id, 0, task, _first_version(members)), tuple(members))
        for (group_id, task), members in siblings.items()
    ]


def _first_version(trajectories: Sequence[Trajectory]) -> int:
    return min((int(t.steps[0].versions[0]) for t in trajectories if t.steps), default=0)
