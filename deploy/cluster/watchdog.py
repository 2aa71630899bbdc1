"""Watchdog of a run: scaling requests, the roster, pauses for a full disk, and missing progress."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from deploy.cluster.control import wanted_workers, write_roster
from deploy.config.config_errors import ConfigError
from deploy.config.supervise import PartLost, SupervisionSettings, brief
from rollout.wire.metrics import Row


class Supervised(Protocol):
    """The methods of a runtime that the watchdog calls."""

    @property
    def playing(self) -> bool: ...

    def scale(self, workers: int) -> None: ...
    def roster(self) -> list[dict[str, Any]]: ...
    async def state(self) -> dict[str, Any]: ...
    async def counters(self) -> Row: ...
    async def stacks(self) -> dict[str, str]: ...


class Watchdog:
    """At every heartbeat: apply `manta scale`, write the roster, report a full disk and missing progress.

    folder: where the roster and stacks are written. asked_in: where requests of `manta scale` lie, if elsewhere.
    """

    def __init__(
        self,
        ring: Supervised,
        folder: Path,
        settings: SupervisionSettings,
        say: Callable[[str], None],
        asked_in: Path | None = None,
    ) -> None:
        self._ring = ring
        self._folder = folder
        self._asked_in = asked_in or folder
        self._settings = settings
        self._say = say
        self._wanted: int | None = None
        self._refused = ""  # the message about a request that cannot be met
        self._roster: list[dict[str, Any]] = []
        self._paused: str | None = None
        self._mark: tuple[Any, ...] = ()
        self._moved = time.monotonic()

    async def run(self) -> None:
        """Run until cancelled."""
        while True:
            self._follow()  # before the first sleep: a run may be shorter than a heartbeat
            try:
                state = await self._ring.state()
                await self._look(state)
            except PartLost as error:  # handled by the replay buffer's own heartbeat
                self._say(brief(error))
            await asyncio.sleep(self._settings.heartbeat_interval_seconds)

    def _follow(self) -> None:
        try:
            wanted = wanted_workers(self._asked_in)
            if wanted is not None and wanted != self._wanted:
                self._wanted = wanted
                self._ring.scale(wanted)
                self._say(f"scaling to {wanted} rollout workers")
        except ConfigError as error:  # the run continues unchanged
            if str(error) != self._refused:
                self._say(str(error))
            self._refused = str(error)
        else:
            self._refused = ""
        roster = self._ring.roster()
        if roster != self._roster:
            try:
                write_roster(self._folder, roster)
            except OSError as error:  # a full disk; retried at the next heartbeat
                self._say(f"{self._folder}: the roster could not be written: {error.strerror}")
            else:
                self._roster = roster

    async def _look(self, state: dict[str, Any]) -> None:
        if state["paused"] != self._paused:
            self._paused = state["paused"]
            self._say(
                f"PAUSED: {self._paused}" if self._paused else "RESUMED: there is room on the disk again"
            )
        turns = (await self._ring.counters()).get("turns", 0)
        mark = (state["version"], state["ready"], turns, bool(self._paused))
        now = time.monotonic()
        if mark != self._mark or self._paused or not self._ring.playing:
            self._mark, self._moved = mark, now
        elif now - self._moved > self._settings.progress_timeout_seconds:
            self._moved = now
            await self._dump(state)

    async def _dump(self, state: dict[str, Any]) -> None:
        stacks = await self._ring.stacks()
        path = self._folder / f"stacks-{time.strftime('%Y%m%d-%H%M%S')}.txt"
        text = "".join(f"==== {part}\n{told}\n" for part, told in stacks.items())
        limit = self._settings.progress_timeout_seconds
        try:
            path.write_text(f"{state}\n{self._ring.roster()}\n\n{text}", encoding="utf-8")
        except OSError as error:  # a full disk does not stop the run
            self._say(f"{path} could not be written: {error.strerror}; no progress: {state['missing']}")
        else:
            self._say(f"no turn and no step for {limit:g} s: {state['missing']}; all stacks are in {path}")
