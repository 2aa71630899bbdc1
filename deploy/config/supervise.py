"""Supervision of a run's parts: when a part counts as lost, its restart budget, and error texts."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, Field

from deploy.config.timestamps import timestamp
from rollout.wire.process_info import ProcessInfo

T = TypeVar("T")

LOSSES = "losses.jsonl"  # in the run folder: one line for each loss of a part
_OVERRUN_SECONDS = 2.0


class SupervisionSettings(BaseModel):
    """When a part counts as lost, and how often it may be restarted."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    heartbeat_interval_seconds: float = Field(
        2.0, gt=0, description="interval between heartbeats of a part, seconds"
    )
    heartbeat_timeout_seconds: float = Field(
        30.0,
        gt=0,
        description="time limit for the answer to a heartbeat, seconds; a part that exceeds it is killed and "
        "replaced",
    )
    max_restarts: int = Field(
        5, ge=0, description="times that one part may be lost within the window; beyond it the run stops"
    )
    restart_window_seconds: float = Field(1800.0, gt=0, description="length of that window, seconds")
    drain_timeout_seconds: float = Field(
        30.0, gt=0, description="time that a worker has to finish running turns when it is removed, seconds"
    )
    progress_timeout_seconds: float = Field(
        180.0,
        gt=0,
        description="time without a finished turn or step after which the stacks of all processes are written "
        "to the run folder, seconds",
    )


@dataclass(frozen=True, slots=True)
class TimeLimits:
    """Limits of a run's waits, seconds, that grow with the bytes of its model."""

    start: float  # of an engine or a rank: it reads the model, or a checkpoint
    publish: float  # from parameters to a version that engines can open
    sync: float  # of one engine, from there to the proof
    load: float  # within a sync: while a version is loaded, an engine answers no heartbeat
    save: float  # of a checkpoint


class PartLost(RuntimeError):
    """A part died or did not answer in time; it may be restarted."""


class PartFailed(RuntimeError):
    """A part was lost more often than its budget allows; the run stops. The message names part, host, log and error."""


@dataclass
class Budget:
    """Restart budget of each part within the window; `spend` raises PartFailed beyond it.

    folder: the run's, where every loss is noted in LOSSES; None: nowhere.
    """

    settings: SupervisionSettings
    clock: Callable[[], float] = time.monotonic
    folder: Path | None = None
    _losses: dict[str, deque[float]] = field(default_factory=dict)
    total: Counter[str] = field(default_factory=Counter)

    def spend(self, part: str, where: ProcessInfo | None, error: BaseException) -> None:
        now = self.clock()
        losses = self._losses.setdefault(part, deque())
        losses.append(now)
        self.total[part] += 1
        if self.folder is not None:
            note_loss(self.folder, part, where, error)
        while losses[0] < now - self.settings.restart_window_seconds:
            losses.popleft()
        if len(losses) > self.settings.max_restarts:
            raise PartFailed(
                f"{part} was lost {len(losses)} times within {self.settings.restart_window_seconds:g} s "
                f"(supervision.max_restarts={self.settings.max_restarts}); {place(where)}; "
                f"the last error: {brief(error)}"
            ) from error


def note_loss(folder: Path, part: str, where: ProcessInfo | None, error: BaseException) -> None:
    """Append a loss to LOSSES in the run's folder; a full disk loses the line, not the run."""
    told = {
        "time": timestamp(),
        "part": part,
        "where": place(where),
        "error": brief(error),
    }
    with suppress(OSError), (folder / LOSSES).open("a", encoding="utf-8") as log:
        log.write(json.dumps(told) + "\n")


def place(where: ProcessInfo | None) -> str:
    return "it never started" if where is None else f"host {where.host}, pid {where.pid}, log {where.log}"


def brief(error: BaseException) -> str:
    """An error in one line; of a remote traceback its last line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    named = lines[-1] if lines else ""
    return named if type(error).__name__ in named else f"{type(error).__name__}: {named}"


async def within(seconds: float, pending: Awaitable[T], what: str) -> T:
    """Wait for an answer at most `seconds`; PartLost names the part that owes it.

    A wait far beyond its limit means that this process itself was stopped (Ctrl-Z, a frozen machine); the limit then
    starts again.
    """
    answer = asyncio.ensure_future(pending)
    try:
        while True:
            began = time.monotonic()
            done, _ = await asyncio.wait({answer}, timeout=seconds)
            if done:
                return answer.result()
            if time.monotonic() - began < seconds + _OVERRUN_SECONDS:
                raise PartLost(f"{what} did not answer within {seconds:g} s")
    finally:
        answer.cancel()
