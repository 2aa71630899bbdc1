"""An evaluation spread over the members of a fleet, whole although some of them are lost on the way."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from deploy.member import Member
from rollout.wire.store import EpisodeRow
from rollout.wire.trajectory import Task

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

    `members` are those that serve right now, `lose` is told of one that failed, `failed` ends it with its error.
    """
    shares = deque((start, tasks[start : start + SHARE]) for start in range(0, len(tasks), SHARE))
    total = len(shares)
    played: dict[int, list[EpisodeRow]] = {}
    busy: dict[str, asyncio.Task[None]] = {}

    async def play(member: Member, start: int, share: Sequence[Task]) -> None:
        try:
            played[start] = await member.evaluate(share, name)
        except Exception as error:  # whatever it is, the member is lost by it and the share is not
            shares.append((start, share))
            lose(member, error)

    try:
        while len(played) < total:
            for member in members():
                if shares and (member.name not in busy or busy[member.name].done()):
                    busy[member.name] = asyncio.create_task(play(member, *shares.popleft()))
            waiting: set[asyncio.Future[Any]] = {task for task in busy.values() if not task.done()}
            await asyncio.wait({*waiting, failed}, timeout=_POLL_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            if failed.done():
                failed.result()
    finally:
        for task in busy.values():
            task.cancel()
    return [row for start in sorted(played) for row in played[start]]
