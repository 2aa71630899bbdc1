"""The interface of a rollout worker for the fleet, independent of where it runs; its heartbeats, and its loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from deploy.config.supervise import PartLost, within
from rollout.buffer.replay_store import EpisodeRow
from rollout.engines.engine import SleepLevel
from rollout.episodes.evaluation import EvaluationPlan
from rollout.wire.metrics import Row
from rollout.wire.process_info import ProcessInfo
from rollout.wire.trajectory import Task
from rollout.wire.weights import SyncReport, WeightUpdate

_WHY_SECONDS = 2.0


class Member(Protocol):
    """A rollout worker. Calls raise the worker's error, or an error that it is dead. `kill` also ends a frozen one.

    sleep: its engine gives up its memory until the next sync.

    standing: how long the worker's event loop has been blocked, and in which line of code; empty if it is not.
    """

    name: str

    async def start(self) -> ProcessInfo: ...
    async def sync(self, update: WeightUpdate) -> SyncReport: ...
    async def sleep(self, level: SleepLevel) -> None: ...
    async def run(self) -> None: ...
    async def evaluate(self, tasks: Sequence[Task], name: str, plan: EvaluationPlan) -> list[EpisodeRow]: ...
    async def ping(self) -> None: ...
    async def standing(self) -> str: ...
    async def stop(self) -> None: ...
    async def drain(self) -> None: ...
    async def counters(self) -> Row: ...
    async def close(self) -> None: ...
    async def kill(self) -> None: ...


async def beat(member: Member, seconds: float, more: Callable[[], float]) -> None:
    """Await a heartbeat: `seconds`, then `more()` more for an engine that is loading weights. Raises PartLost."""
    what = f"{member.name} (heartbeat)"
    try:
        await within(seconds, member.ping(), what)
    except PartLost:
        if not (longer := more()):
            raise
        try:
            await within(longer, member.ping(), what)
        except PartLost as late:
            raise PartLost(f"{what} did not answer within {seconds + longer:.4g} s") from late


async def explained(error: Exception, member: Member) -> Exception:
    """The error of a lost member; for one that did not answer, with a report of its other threads."""
    if not isinstance(error, PartLost):
        return error
    try:
        told = await within(_WHY_SECONDS, member.standing(), member.name)
    except Exception:  # any error: the loss is reported in any case
        told = "its other threads do not answer either: its process was stopped, or a call into C holds the interpreter"
    return PartLost(f"{error}: {told or 'its event loop runs, but its engine does not answer'}")
