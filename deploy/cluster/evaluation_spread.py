"""An evaluation spread over the members of a fleet, whole although some of them are lost on the way."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Any

from deploy.cluster.member import Member
from deploy.config.supervise import brief
from rollout.buffer.leases import ALONE_AFTER
from rollout.buffer.replay_store import EpisodeRow
from rollout.wire.trajectory import DropReason, EndReason, Task

SHARE = 64  # tasks a member is given at a time, so that the loss of one costs little
_POLL_SECONDS = 0.5  # how soon a member that has joined is given a share


async def spread(
    tasks: Sequence[Task],
    name: str,
    members: Callable[[], Sequence[Member]],
    lose: Callable[[Member, BaseException], None],
    failed: asyncio.Future[None],
) -> list[EpisodeRow]:
    """One episode a task, in the order of `tasks`; what a lost member was playing is played by another.

    A task by which members are lost is given up as crashed, and its row says so: no sound episode. `members` are those
    that serve right now, `lose` is told of one that failed, `failed` ends it with its error.
    """
    shares = _Shares(tasks)
    busy: dict[str, asyncio.Task[None]] = {}

    async def play(member: Member, share: Sequence[int]) -> None:
        try:
            shares.played(share, await member.evaluate([tasks[place] for place in share], name))
        except Exception as error:  # whatever it is, the member is lost by it and the share is not
            shares.lost(share, error)
            lose(member, error)

    try:
        while not shares.finished:
            for member in members():
                if shares.waiting and (member.name not in busy or busy[member.name].done()):
                    busy[member.name] = asyncio.create_task(play(member, shares.waiting.popleft()))
            waiting: set[asyncio.Future[Any]] = {task for task in busy.values() if not task.done()}
            await asyncio.wait({*waiting, failed}, timeout=_POLL_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            if failed.done():
                failed.result()
    finally:
        for task in busy.values():
            task.cancel()
    return shares.rows()


class _Shares:
    """What is to be played, by the places of the tasks, and what has been.

    As in training, a task that was held by ALONE_AFTER members when they were lost is played by itself from then on: if
    that member is lost too, the task is the cause.
    """

    def __init__(self, tasks: Sequence[Task]) -> None:
        self._tasks = tasks
        places = range(len(tasks))
        self.waiting: deque[Sequence[int]] = deque(
            [places[first : first + SHARE] for first in places[::SHARE]]
        )
        self._losses: Counter[int] = Counter()  # by place: members that were lost while they held it
        self._rows: dict[int, EpisodeRow] = {}

    @property
    def finished(self) -> bool:
        return len(self._rows) == len(self._tasks)

    def rows(self) -> list[EpisodeRow]:
        return [self._rows[place] for place in sorted(self._rows)]

    def played(self, share: Sequence[int], rows: Sequence[EpisodeRow]) -> None:
        self._rows.update(zip(share, rows, strict=True))

    def lost(self, share: Sequence[int], error: Exception) -> None:
        """A member was lost with these: they wait for another one, or are given up."""
        if self._losses[share[0]] >= ALONE_AFTER:  # it was there by itself
            (place,) = share
            self._rows[place] = self._crashed(self._tasks[place], self._losses[place] + 1, error)
            return
        self._losses.update(share)
        alone = self._losses[share[0]] >= ALONE_AFTER
        self.waiting.extend([[place] for place in share] if alone else [share])

    def _crashed(self, task: Task, losses: int, error: Exception) -> EpisodeRow:
        told = (
            f"{DropReason.CRASHED}: {losses} rollout workers were lost while they played {task.env_id} (seed "
            f"{task.seed}), the last one with no other task; its error: {brief(error)}"
        )
        return EpisodeRow(0, EndReason.FAILED, 0.0, None, 0, 0, -1, told)
