"""Evaluation distributed over the members of a fleet; the tasks of a lost member are played by others."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from deploy.cluster.member import Member
from deploy.config.supervise import brief
from rollout.buffer.leases import ALONE_AFTER
from rollout.buffer.replay_store import EpisodeRow
from rollout.episodes.evaluation import EvaluationPlan
from rollout.wire.trajectory import DropReason, EndReason, Task

SHARD = 64  # episodes of a member at a time; bounds the cost of losing one
_POLL_SECONDS = 0.5  # interval at which new members get tasks


async def evaluate_on(
    tasks: Sequence[Task],
    name: str,
    plan: EvaluationPlan,
    members: Callable[[], Sequence[Member]],
    lose: Callable[[Member, BaseException], None],
    failed: asyncio.Future[None],
) -> list[EpisodeRow]:
    """Play the samples of every task, one task after another; tasks of a lost member move to others.

    A task that several members were lost with is given up; its row has the end reason FAILED and the cause. members:
    those that serve at the moment; lose: called with a member that failed; failed: ends the evaluation with its error.
    """
    shards = _Shards(tasks, plan.samples)
    busy: dict[str, asyncio.Task[None]] = {}

    async def play(member: Member, shard: Sequence[int]) -> None:
        try:
            shards.played(shard, await member.evaluate([tasks[place] for place in shard], name, plan))
        except Exception as error:  # any error: the member counts as lost, its tasks do not
            shards.lost(shard, error)
            lose(member, error)

    try:
        while not shards.finished:
            for member in members():
                if shards.waiting and (member.name not in busy or busy[member.name].done()):
                    busy[member.name] = asyncio.create_task(play(member, shards.waiting.popleft()))
            waiting: set[asyncio.Future[Any]] = {task for task in busy.values() if not task.done()}
            await asyncio.wait({*waiting, failed}, timeout=_POLL_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            if failed.done():
                failed.result()
    finally:
        for task in busy.values():
            task.cancel()
    return shards.rows()


class _Shards:
    """Shards of tasks (by position) that wait to be played, and the rows of those that were.

    As in training, a task that ALONE_AFTER members were lost with is played alone from then on: if that member is lost
    too, the task is the cause.
    """

    def __init__(self, tasks: Sequence[Task], samples: int) -> None:
        self._tasks = tasks
        self._samples = samples
        places, size = range(len(tasks)), max(1, SHARD // samples)
        self.waiting: deque[Sequence[int]] = deque([places[first : first + size] for first in places[::size]])
        self._losses: Counter[int] = Counter()  # by position: members lost with the task
        self._rows: dict[int, Sequence[EpisodeRow]] = {}  # by position: its samples

    @property
    def finished(self) -> bool:
        return len(self._rows) == len(self._tasks)

    def rows(self) -> list[EpisodeRow]:
        return [row for place in sorted(self._rows) for row in self._rows[place]]

    def played(self, shard: Sequence[int], rows: Sequence[EpisodeRow]) -> None:
        samples = self._samples
        if len(rows) != samples * len(shard):
            raise RuntimeError(
                f"{len(rows)} episodes came back of {len(shard)} tasks with {samples} samples each"
            )
        for number, place in enumerate(shard):
            self._rows[place] = rows[number * samples : (number + 1) * samples]

    def lost(self, shard: Sequence[int], error: Exception) -> None:
        """A member was lost with these tasks: they wait for another one, or are given up."""
        if self._losses[shard[0]] >= ALONE_AFTER:  # it was played alone
            (place,) = shard
            crashed = self._crashed(self._tasks[place], self._losses[place] + 1, error)
            self._rows[place] = [replace(crashed, episode=index) for index in range(self._samples)]
            return
        self._losses.update(shard)
        alone = self._losses[shard[0]] >= ALONE_AFTER
        self.waiting.extend([[place] for place in shard] if alone else [shard])

    def _crashed(self, task: Task, losses: int, error: Exception) -> EpisodeRow:
        told = (
            f"{DropReason.CRASHED}: {losses} rollout workers were lost while they played {task.env_id} (seed "
            f"{task.seed}), the last one with no other task; its error: {brief(error)}"
        )
        return EpisodeRow(0, EndReason.FAILED, 0.0, None, 0, 0, -1, told)
