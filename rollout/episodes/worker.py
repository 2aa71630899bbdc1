"""The rollout worker: plays the groups the replay buffer gives out, on one engine.

    while assignment := await buffer.reserve():
        await buffer.add(slot, encode(await run_group(slot, ...)))

`concurrent_groups` such loops run at once. Each waits for the replay buffer (slots are freed when the learner's new
weights have reached every engine) and for the engine, and for nothing else. A recorder makes finished turns durable, so
that another worker can resume a group when this one is lost.
"""

from __future__ import annotations

import asyncio
import logging
import traceback
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field

from envs.hosting.host import CustomResources
from rollout.agents.agent import Agent
from rollout.buffer.failures import cause_of
from rollout.buffer.replay_store import EpisodeRow
from rollout.engines.engine import Engine, EngineDied
from rollout.episodes.episode import EpisodeLimits, EpisodeSpec
from rollout.episodes.evaluation import ONCE, EvaluationPlan, evaluation_specs
from rollout.episodes.group import concurrently, play, run_group
from rollout.episodes.opponents import Opponents, opposed
from rollout.episodes.pool import EnvironmentPool
from rollout.episodes.recorder import Recorder
from rollout.episodes.rollout_metrics import RecordingListener, RolloutMetrics
from rollout.wire.policies import POLICY
from rollout.wire.schema import encode, restore_turns
from rollout.wire.trajectory import (
    Assignment,
    DropReason,
    EndReason,
    EnvironmentKey,
    Group,
    Slot,
    StaleSlot,
    Task,
    Trajectory,
)
from rollout.wire.weights import SyncReport, WeightUpdate

log = logging.getLogger(__name__)


class EvaluationStopped(RuntimeError):
    """The worker was stopped during an evaluation."""


class RolloutSettings(BaseModel):
    """How episodes are sampled, and by how many workers."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    workers: int = Field(
        1,
        gt=0,
        description="rollout workers, each with an engine of its own. `manta scale` changes it during a run",
    )
    cpus_per_worker: float = Field(
        1.0, ge=0, description="CPUs reserved on the Ray cluster per worker; fractions allowed"
    )
    gpus_per_worker: float = Field(
        0.0,
        ge=0,
        description="GPUs reserved on the Ray cluster per worker; fractions allowed. 0 runs the engine on CPU",
    )
    resources_per_worker: CustomResources = Field(
        default_factory=dict,
        description="custom Ray resources reserved per worker, as in {rollout = 1}: it is placed only on a node that "
        "offers them, such as a group of nodes for rollouts",
    )
    group_size: int = Field(
        8, gt=0, description="episodes played of each task; group-relative advantages compare them"
    )
    concurrent_groups: int = Field(
        32,
        gt=0,
        description="groups that one worker plays at once; times group_size it is the number of concurrent "
        "episodes. Raise it until the engine is saturated",
    )
    dynamic_sampling: bool = Field(
        False,
        description="dynamic sampling (DAPO): drop a group whose episodes all earned the same reward, and "
        "play another task instead. For advantages that compare the rewards of a group",
    )
    context_tokens: int = Field(
        1024,
        gt=1,
        description="context length, tokens of a prompt and its answer together. An episode without room for "
        "another turn ends as a context overflow",
    )
    max_turns: int = Field(100, gt=0, description="turns after which an episode is truncated")
    episode_seconds: float = Field(
        600.0,
        gt=0,
        description="time limit for an episode, seconds; beyond it the episode has failed. Time spent waiting "
        "for a free slot to call the environment does not count",
    )

    @property
    def limits(self) -> EpisodeLimits:
        return EpisodeLimits(self.max_turns, self.episode_seconds)

    @property
    def episodes(self) -> int:
        """Concurrent episodes of a worker."""
        return self.concurrent_groups * self.group_size

    @property
    def needed(self) -> int:
        """Episodes of a group that must not fail: a baseline needs a sibling."""
        return min(self.group_size, 2)


class Player(NamedTuple):
    """Who plays the episodes of an environment, and within which limits."""

    agent: Agent
    limits: EpisodeLimits


class GroupBuffer(Protocol):
    """The part of the replay buffer, local or remote, that a worker uses."""

    async def reserve(self, worker: str, worker_loop: int) -> Assignment | None: ...

    async def record_turns(self, batch: pa.RecordBatch) -> None: ...

    async def add(self, slot: Slot, batch: pa.RecordBatch, episodes: Sequence[EpisodeRow]) -> None: ...

    async def drop(
        self, slot: Slot, reason: DropReason, error: str = "", episodes: Sequence[EpisodeRow] = ()
    ) -> None: ...


class RolloutWorker:
    """Engine, agents and environments of one worker. Agents use the engine; the host of the worker syncs it.

    players: of single environments, whose tasks have these ids and options; `agent` and the limits of `settings` are
    those of all others. All agents share the engine's clock. policy: the name of the one
    that the engine holds. opponents: who plays the other seat of its games.
    """

    def __init__(
        self,
        name: str,
        engine: Engine,
        agent: Agent,
        replay_buffer: GroupBuffer,
        settings: RolloutSettings,
        run_seed: int,
        pool: EnvironmentPool | None = None,
        players: Mapping[EnvironmentKey, Player] | None = None,
        policy: str = POLICY,
        opponents: Opponents | None = None,
    ) -> None:
        self.name = name
        self.policy = policy
        self._opponents = opponents
        self.engine = engine
        self._engine_clock = agent.engine_clock
        self._others = Player(agent, settings.limits)
        self._players = dict(players or {})
        self._replay_buffer = replay_buffer
        self._settings = settings
        self._run_seed = run_seed
        self._pool = EnvironmentPool() if pool is None else pool
        self._metrics = RolloutMetrics()
        self._recorder = Recorder(replay_buffer, name)
        self._listener = RecordingListener(self._metrics, self._recorder)
        self._groups: Counter[str] = Counter()
        self._reserving: set[asyncio.Future[Assignment | None]] = set()  # loops that wait for a slot
        self._evaluations: set[asyncio.Future[list[Trajectory]]] = set()
        self._running: tuple[asyncio.Task[list[None]], asyncio.Task[None]] | None = None  # loops, recorder
        self._idle = asyncio.Event()  # run() is not under way

    async def run(self) -> None:
        """Play groups until the replay buffer has no more of them, or until `drain` or `stop`.

        Raises the error that ends a loop or the recorder (EngineDied, a lost replay buffer, a bug in Manta). Finished
        turns are recorded first, unless the replay buffer has failed. When cancelled, it leaves its slots to the
        ledger.
        """
        if self._running is not None:
            raise RuntimeError(f"{self.name} is running already")
        self._listener.halted = False
        loops = asyncio.create_task(
            concurrently(
                self._play_groups(worker_loop) for worker_loop in range(self._settings.concurrent_groups)
            )
        )
        recording = asyncio.create_task(self._recorder.run())
        self._running = loops, recording
        self._idle.clear()
        try:
            # The recorder ends first by an error alone.
            await asyncio.wait({loops, recording}, return_when=asyncio.FIRST_COMPLETED)
            if not recording.done():
                self._recorder.finish()
            await recording
        finally:
            loops.cancel()
            recording.cancel()
            await asyncio.wait({loops, recording})
            self._running = None
            self._idle.set()
        if not loops.cancelled():  # as `stop` does, which is no error
            loops.result()

    async def drain(self, timeout_seconds: float = 30.0) -> None:
        """Stop reserving groups, let turns that are being sampled end, and return when all turns are durable.

        Turns that take longer than `timeout_seconds` are cancelled and will be sampled again. The worker keeps its
        leases. Raises errors of the replay buffer.
        """
        self._halt()
        if self._running is not None:
            await asyncio.wait({self._running[0]}, timeout=timeout_seconds)
        await self.stop()

    async def stop(self) -> None:
        """`drain` without waiting for turns that are being sampled.

        `run` may be called again once the replay buffer has ended this worker's leases (`rollback`, `reassign`).
        """
        self._halt()
        for evaluation in self._evaluations:
            evaluation.cancel()
        if self._running is None:
            return
        loops, recording = self._running
        loops.cancel()
        await self._idle.wait()
        if not recording.cancelled():
            recording.result()

    async def sync(self, update: WeightUpdate) -> SyncReport:
        """Load one version of the worker's policy and verify it. Raises as `Engine.sync` does."""
        update.manifest.require_policy(self.policy, self.name)
        return await self.engine.sync(update)

    async def evaluate(self, tasks: Sequence[Task], plan: EvaluationPlan = ONCE) -> list[Trajectory]:
        """Play `plan.samples` episodes per task, as many at once as in training.

        Returns the samples of the first task, then those of the second. Sampling depends on (run seed, task seed,
        number of the sample) only, so that two evaluations differ by the weights only. Raises EvaluationStopped.
        """
        gate = asyncio.Semaphore(self._settings.episodes)
        specs = evaluation_specs(
            tasks, plan.samples, self._run_seed, self.name, self.engine.version, self.policy
        )
        playing = asyncio.ensure_future(concurrently(self._evaluate_one(spec, plan, gate) for spec in specs))
        self._evaluations.add(playing)
        try:
            return await playing
        except asyncio.CancelledError:
            if playing.cancelled() and self._listener.halted:
                raise EvaluationStopped(f"{self.name} was stopped during an evaluation") from None
            raise
        finally:
            self._evaluations.discard(playing)

    def counters(self) -> dict[str, float]:
        """Sums since the worker was created.

        engine_seconds: wall time with at least one request in the engine. The others are those of `RolloutMetrics.row`.
        """
        return {
            **self._metrics.row(),
            "groups": self._groups["played"],
            "groups_dropped": self._groups["dropped"],
            "groups_uniform": self._groups["uniform"],
            "groups_superseded": self._groups["superseded"],
            "engine_seconds": self._engine_clock.seconds,
        }

    def heartbeat(self) -> dict[str, float]:
        """Seconds since a turn last ended, and the largest delay of the event loop since the last heartbeat."""
        return {
            "last_turn_seconds": self._metrics.seconds_since_turn(),
            "loop_lag": self._recorder.loop_lag(),
        }

    async def close(self) -> None:
        """Close the idle environment replicas and the opponents' engines; the host of the worker closes its own."""
        await self._pool.close()
        if self._opponents is not None:
            await self._opponents.close()

    def _player(self, task: Task) -> Player:
        return self._players.get(task.environment, self._others)

    def _halt(self) -> None:
        self._listener.halted = True
        for reserving in self._reserving:
            reserving.cancel()

    async def _reserve(self, worker_loop: int) -> Assignment | None:
        reserving = asyncio.ensure_future(self._replay_buffer.reserve(self.name, worker_loop))
        self._reserving.add(reserving)
        try:
            return await reserving
        except asyncio.CancelledError:
            if self._listener.halted:
                return None
            raise
        finally:
            self._reserving.discard(reserving)

    async def _play_groups(self, worker_loop: int) -> None:
        while not self._listener.halted and (assignment := await self._reserve(worker_loop)):
            try:
                async with opposed(assignment.slot, self._opponents) as opponent:
                    group = await self._play_group(assignment, opponent)
            except Exception as error:
                if not assignment.losses or isinstance(error, EngineDied):
                    raise
                await self._give_up(assignment.slot, error)
                continue
            if any(trajectory.end_reason is EndReason.CANCELLED for trajectory in group.trajectories):
                return  # halted: another worker resumes the group from its turns
            try:
                await self._commit(group)
            except StaleSlot:
                self._groups["superseded"] += 1  # another worker plays it, and commits it
            # After the call: if it is cancelled, the turns must still be recorded.
            self._recorder.forget(assignment.slot)

    async def _play_group(self, assignment: Assignment, opponent: Agent | None) -> Group:
        agent, limits = self._player(assignment.slot.task)
        return await run_group(
            assignment.slot,
            self._pool,
            agent,
            self._settings.group_size,
            limits,
            self._run_seed,
            self.name,
            self._listener,
            {} if assignment.turns is None else restore_turns(assignment.turns),
            own_process=assignment.losses > 0,
            opponent=opponent,
        )

    async def _give_up(self, slot: Slot, error: Exception) -> None:
        """Drop a group with which a worker was lost before, and which would crash this one too."""
        told = "".join(traceback.format_exception(error))
        said = "group %d is dropped: a second worker could not play it: %r\n%s"
        log.error(said, slot.group_id, error, told)
        try:
            await self._replay_buffer.drop(slot, DropReason.CRASHED, told)
        except StaleSlot:
            self._groups["superseded"] += 1
        else:
            self._groups["dropped"] += 1
        self._recorder.forget(slot)

    async def _commit(self, group: Group) -> None:
        for trajectory in group.trajectories:
            self._note_end(trajectory)
        rows = [EpisodeRow.of(trajectory) for trajectory in group.trajectories]
        if len(group.trainable) < self._settings.needed:
            errors = [trajectory.error for trajectory in group.trajectories if trajectory.error]
            await self._replay_buffer.drop(group.slot, DropReason.FAILED, errors[0] if errors else "", rows)
            self._groups["dropped"] += 1
        elif self._settings.dynamic_sampling and group.equal_rewards:
            await self._replay_buffer.drop(group.slot, DropReason.EQUAL_REWARDS, "", rows)
            self._groups["uniform"] += 1
        else:
            await self._replay_buffer.add(group.slot, encode(group), rows)
            self._groups["played"] += 1

    async def _evaluate_one(
        self, spec: EpisodeSpec, plan: EvaluationPlan, gate: asyncio.Semaphore
    ) -> Trajectory:
        agent, limits = self._player(spec.task)
        agent = agent.sampled_by(plan.sampling.over)
        async with gate:
            trajectory = await play(spec, self._pool, agent, limits, self._metrics)
        self._note_end(trajectory)
        return trajectory.unrouted()

    def _note_end(self, trajectory: Trajectory) -> None:
        self._metrics.ended(trajectory)
        if trajectory.error:
            log.warning("an episode failed and is not trained on: %s", cause_of(trajectory.error))
