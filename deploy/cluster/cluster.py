"""The ring as Ray actors: one replay buffer, one learner, a fleet of rollout workers, on this machine or on a cluster.

The driver holds handles and small rows only. Groups go from a worker to the replay buffer and on to the learner, and
weights from the learner to the engines, through Ray's object store.

What dies or freezes is replaced: rollout workers by the fleet; the replay buffer by Ray itself (max_restarts), which
then repeats the calls that were under way (max_task_retries), since the replay buffer finds on disk what it was; the
learner by `recover`, from its newest checkpoint. Heartbeats find what is frozen, and `ray.kill` ends a stopped process
too.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from deploy.assembly.build import EngineFactory, replay_buffer_builder, start_engine
from deploy.assembly.league import League
from deploy.assembly.models import build_learner, model_path, teacher_path
from deploy.assembly.runtime import LearnerLost, Met, Row, alone, first_failure, loss_to_come, waited_for
from deploy.assembly.stage_data import gather
from deploy.assembly.time_limits import time_limits
from deploy.assembly.turns import Turns, sleep_level, step_in_turn
from deploy.cluster.actor_member import ActorMember
from deploy.cluster.buffer_part import BufferPart
from deploy.cluster.connect import require_room
from deploy.cluster.engine_groups import EngineGroups, placed
from deploy.cluster.fleet import Fleet
from deploy.cluster.learner_part import LearnerPart
from deploy.cluster.model_nodes import fetch_on_nodes
from deploy.cluster.native import DirectSync, native_publisher
from deploy.cluster.offers import Offers
from deploy.cluster.ray_actors import actor, stacks_of
from deploy.cluster.step_ahead import StepAhead
from deploy.cluster.watchdog import Watchdog
from deploy.config.config import RunConfig
from deploy.config.supervise import Budget, note_loss, within
from deploy.report.noticed import Noticed
from deploy.report.phases import Startup
from learner.parallel.ranks import RankLost
from learner.training.checkpoint import newest
from learner.training.loop import sync_metrics
from rollout.buffer.actors import RemoteReplayBuffer
from rollout.buffer.replay_store import EpisodeRow
from rollout.episodes.actors import GROUPS, RolloutActor, demonstrate
from rollout.episodes.evaluation import EvaluationPlan
from rollout.wire.metrics import joined
from rollout.wire.trajectory import Task
from rollout.wire.weights import SyncReport, WeightUpdate

T = TypeVar("T")


class RayRuntime:
    """Every part of a run as an actor, of one policy where it has several; the methods are those of `Runtime`.

    league: the policies that it meets; None: its own versions, if the recipe has a league. met: see several.py.
    asked_in: the folder in which `manta scale` leaves its requests, if it is not the run's own.
    """

    def __init__(
        self,
        config: RunConfig,
        run_folder: Path,
        engine_factory: EngineFactory = start_engine,
        say: Callable[[str], None] = print,
        startup: Startup | None = None,
        league: League | None = None,
        met: Met = alone,
        asked_in: Path | None = None,
    ) -> None:
        self.run_folder = run_folder.resolve()
        self._config = config
        self._engine_factory = engine_factory
        self._league, self._met = league or League.alone(config, self.run_folder), met
        self._asked_in = asked_in or self.run_folder
        self._say = say
        self._noticed = Noticed(self.run_folder, say)
        self._startup = startup or Startup()
        self._native = config.weights.transfer != "object_store"
        self._direct = DirectSync(self._native, say)
        self._handles: dict[str, Any] = {}  # of rollout actors, by name
        self._published = asyncio.Event()  # there is a version that engines may be given
        self._learning = asyncio.Event()  # the learner is up
        self._hearts: list[asyncio.Task[None]] = []
        self._steps = StepAhead(self._train)
        self._turns: Turns | None = None  # of engines and learner, where they share GPUs
        self._started = AsyncExitStack()  # ends the parts that were started, the last one first

    async def start(self, resume: bool) -> int:
        config, supervision = self._config, self._config.supervision
        self._path, self._teacher = (each(config, self.run_folder) for each in (model_path, teacher_path))
        with self._startup.timed("model"):
            for path in filter(None, (self._path, self._teacher)):
                await asyncio.to_thread(fetch_on_nodes, config, path)
            self._limits = await asyncio.to_thread(time_limits, config, self._path)
        self._budget = Budget(supervision, folder=self.run_folder)
        self._learner_lost = loss_to_come()
        self._offers = Offers(self._learner_up, self._any_apart, self._lost_touch, self._limits.publish)
        self._engines = EngineGroups(config)
        build = replay_buffer_builder(config, self.run_folder, self._league.owner(config.policy))
        note = partial(note_loss, self.run_folder, "replay buffer")
        self._buffer = BufferPart(build, supervision, config.cluster, self._say, self._noticed, note)
        self._learner = self._learner_part()
        self._started.callback(self._learner.close)
        self._started.push_async_callback(self._buffer.close)
        found = asyncio.create_task(self._find_buffer())
        self._hearts = [found]
        if config.cluster.colocate == "turns":
            self._turns = Turns(
                lambda: self._fleet.sleep(sleep_level(config)),
                lambda: self._watched(self._learner.onload()),
                lambda: self._watched(self._learner.offload()),
            )
        self._fleet = Fleet(
            self._launch,
            self._lend,
            self._hand_on,
            supervision,
            self._limits,
            self._say,
            self._budget,
            left=self._engines.release,
            turn=self._turns.starting if self._turns else nullcontext,
        )
        self._started.callback(self._engines.close)
        self._started.push_async_callback(self._fleet.close)
        # Before the learner's ranks, which are smaller and would break up nodes that engines need whole.
        await self._engines.reserve(config.workers, config.cluster.start_timeout_seconds)
        # A run stopped before its first checkpoint has none to load: it starts over in its folder.
        load = resume and newest(self.run_folder) is not None
        if self._turns is not None:  # before ranks, of which two would fit on one GPU
            names = [f"rollout-{seat}" for seat in range(config.workers)]
            await placed(map(self._handle, names), config.cluster.start_timeout_seconds)
        elif config.weights.transfer != "ipc":
            self._fleet.scale(config.workers)
        version = await first_failure(asyncio.create_task(self._start_learner(load)), [found])
        if config.weights.transfer == "ipc":  # of one GPU an engine takes what the learner has left
            self._fleet.scale(config.workers)
        await found
        if resume:
            await self._buffer.answer("rollback", version, new_driver=True)
        watchdog = Watchdog(self, self.run_folder, supervision, self._say, self._asked_in)
        watching = self._buffer.watch(), self._watch_learner(), watchdog.run()
        self._hearts += [asyncio.create_task(each) for each in watching]
        return version

    async def _find_buffer(self) -> None:
        with self._startup.timed("replay buffer"):
            await self._buffer.find()

    def _learner_part(self) -> LearnerPart:
        config = self._config
        native = partial(native_publisher, config, self._limits.sync) if self._native else None
        build = partial(build_learner, config, self._path, teacher=self._teacher)
        keep = partial(self._league.keep, config.policy)
        return LearnerPart(config, build, RemoteReplayBuffer(self._buffer.handle), self._limits, native, keep)

    async def _start_learner(self, load: bool) -> int:
        with self._startup.timed("learner"):
            version = await self._learner.start(self.run_folder, load)
        self._learning.set()
        return version

    def _handle(self, name: str) -> Any:
        if name not in self._handles:
            build = partial(self._league.build_worker, self._engines.config, self._path, self._engine_factory)
            made = actor(RolloutActor, GROUPS, **self._engines.options(name))
            self._handles[name] = made.remote(name, self._buffer.handle, build)
        return self._handles[name]

    def _launch(self, name: str) -> ActorMember:
        return ActorMember(name, self._handle(name), self._startup, self._noticed.hear, self._apart)

    async def _learner_up(self) -> Any:
        """Rank 0's actor, once the learner is up. PartLost where it does not come back in time."""
        await within(self._limits.start, self._learning.wait(), "the learner (restart)")
        return self._learner.lead

    def _any_apart(self) -> bool:
        return any(self._apart(str(member.get("node", ""))) for member in self._fleet.roster())

    def _apart(self, node: str) -> bool:
        # Engines over several nodes open a version on each of them, which one node's memory does not allow.
        return self._learner.apart(node) and not self._engines.spanning

    async def begin_stage(self, index: int) -> tuple[int, int]:
        if self._turns is not None:
            await self._turns.learner()
        rows = demonstrate.options(num_cpus=0).remote(partial(gather, self._config, index, self._path))
        return await self._watched(self._learner.begin_stage(index, rows))

    async def advance_stage(self, steps: int) -> list[Row]:
        return await self._watched(self._learner.advance_stage(steps))

    async def publish(self, saves: bool = False, then: int | None = None) -> Row:
        """Every serving member holds the learner's version, or is lost; the first time every wanted member serves.

        then: the step that is begun as soon as the version lies where engines load it.
        """
        if (sent := await self._direct.sync(self._fleet, self._send)) is not None:
            await self._met(sent[0].version)
            return sync_metrics(sent)
        if self._turns is not None:
            await self._turns.learner()
            if saves:
                await self._watched(self._learner.copy(self.run_folder))
        async with self._offers.borrowed() as update:
            if self._turns is not None:
                await self._turns.engines()
                if not self._published.is_set():
                    self._fleet.scale(self._config.workers)
            if then is not None:
                self._steps.begin(then)
            reports = await self._fleet.publish(update)
        self._direct.begin()
        if update.version >= 0:
            await self._met(update.version)
        if not self._published.is_set():
            self._published.set()
            await self._fleet.ready()
        return sync_metrics(reports)

    async def _send(self, names: Sequence[str]) -> list[SyncReport]:
        return await self._watched(self._learner.send({name: self._handles[name] for name in names}))

    async def evaluate(self, tasks: Sequence[Task], name: str, plan: EvaluationPlan) -> list[EpisodeRow]:
        rows, limit = self._fleet.evaluate(tasks, name, plan), self._config.evaluation.timeout_seconds
        return await within(limit, rows, f"evaluation {name!r}")

    def begin_rollouts(self) -> None:
        self._fleet.play()

    async def step(
        self, number: int, before_publish: Awaitable[object] | None = None, saves: bool = False
    ) -> Row:
        began = time.perf_counter()
        if self._turns is None:
            row = await self._steps.made(number)
            waited = await self._watched(waited_for(before_publish))
        else:
            groups = RemoteReplayBuffer(self._buffer.handle), self._config.cluster.step_timeout_seconds
            made = step_in_turn(self._turns, number, *groups, self._train, self.publish, before_publish)
            row, waited = await self._watched(made)
        trained = time.perf_counter()
        published = await self._watched(self.publish(saves, None if saves or self._turns else number + 1))
        await self._watched(self._buffer.answer("release", number))
        ended = time.perf_counter()
        times = {"publish_s": ended - trained, "step_s": ended - began}
        return joined(row, waited, published, times, {"workers": float(len(self._fleet.serving))})

    async def _train(self, number: int, others: bool = True) -> Row:
        return await self._watched(self._learner.train(number, others))

    async def recover(self, loss: LearnerLost) -> int:
        self._steps.forget()
        self._learning.clear()
        await self._fleet.pause()
        if self._turns is not None:
            self._fleet.lose_joining(f"its first version was the learner's that is lost: {loss}")
            await self._turns.new_learner()
        again = partial(self._start_learner, load=True)
        version = await self._learner.restarted(loss, self._budget, self._say, again)
        self._learner_lost = loss_to_come()
        self._hearts.append(asyncio.create_task(self._watch_learner()))
        await self._buffer.answer("rollback", version)
        await self._watched(self.publish())
        return version

    async def save(self) -> None:
        await self._watched(self._learner.save(self.run_folder))

    async def landed(self) -> None:
        await self._watched(self._learner.landed())

    async def counters(self) -> Row:
        return await self._fleet.counters()

    async def counts(self) -> dict[str, int]:
        return dict(await self._buffer.answer("counts"))

    @property
    def playing(self) -> bool:
        """Whether groups are being played: from the first rollouts to the last step."""
        return self._fleet.playing

    def scale(self, workers: int) -> None:
        """Have so many rollout workers from now on. ConfigError where there is no room for them."""
        require_room(self._config, workers)
        self._fleet.scale(workers)

    async def state(self) -> dict[str, Any]:
        """The replay buffer's own words about where the run stands."""
        return dict(await self._buffer.answer("state", limit=60.0))

    def roster(self) -> list[dict[str, Any]]:
        """Every part of the run: its name, state, host, pid and log."""
        buffer = self._buffer.where
        where = ({"replay buffer": buffer} if buffer else {}) | self._learner.where
        fixed = [{"part": part, "state": "up"} | asdict(place) for part, place in where.items()]
        return fixed + self._fleet.roster()

    async def stacks(self) -> dict[str, str]:
        """What every part is doing; those that do not say are named so."""
        fixed = {"replay buffer": self._buffer.handle} | self._learner.handles
        return await stacks_of(self._handles | fixed)

    async def close(self) -> None:
        """Let the engines stop their processes and the ledger close, then end the actors."""
        self._steps.forget()
        for heart in self._hearts:
            heart.cancel()
        await asyncio.gather(*self._hearts, return_exceptions=True)
        await self._started.aclose()

    @asynccontextmanager
    async def _lend(self) -> AsyncIterator[WeightUpdate]:
        """The published version, for a member that joins; before the first there is nothing to join with."""
        await self._published.wait()
        async with self._offers.borrowed() as update:
            yield update

    def _lost_touch(self, error: RankLost) -> None:
        # Of ranks that lost touch with one another every process may live: no heartbeat would say so.
        if not self._learner_lost.done():
            self._learner_lost.set_exception(LearnerLost(self._learner.loss_message(error)))

    async def _watch_learner(self) -> None:
        lost = self._learner_lost
        how = await self._learner.lost(self._config.supervision, self._noticed.hear)
        if not lost.done():
            lost.set_exception(LearnerLost(how))

    async def _hand_on(self, worker: str, lost: str) -> int:
        self._handles.pop(worker, None)
        return int(await self._buffer.answer("reassign", worker, lost))

    async def _watched(self, pending: Awaitable[T]) -> T:
        # The hearts too: one that stops beating is a fault of ours, and must not go unseen.
        parts = [self._fleet.failed, self._buffer.lost, self._learner_lost, *self._hearts]
        return await first_failure(asyncio.ensure_future(pending), parts)
