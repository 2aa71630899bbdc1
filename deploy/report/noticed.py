"""Notices of a run's parts (rollout/wire/notices.py), printed once on the console and stored in RUN/notices.log."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from deploy.report.console import one_line
from rollout.wire.notices import MOST, kind

FILE = "notices.log"
Hear = Callable[[str, Sequence[str]], None]  # called with the name of a part and its notices


class Noticed:
    """The notices of all parts of a run or an evaluation since its start: each kind once, at most MOST.

    folder: where FILE is stored; None: nowhere.
    """

    def __init__(self, folder: Path | None, say: Callable[[str], None]) -> None:
        self._folder = folder
        self._say = say
        self._kinds: set[str] = set()

    def hear(self, part: str, texts: Iterable[str]) -> None:
        """Print and store notices of kinds that no part has reported before."""
        for text in texts:
            if kind(text) in self._kinds or len(self._kinds) == MOST:
                continue
            self._kinds.add(kind(text))
            said = one_line(f"note: {text}" + (f" ({part})" if part else ""))
            self._say(said)
            self._keep(said)

    def _keep(self, said: str) -> None:
        if self._folder is None:
            return
        # A full disk pauses a run and does not end it; the console has the notice.
        with suppress(OSError), (self._folder / FILE).open("a", encoding="utf-8") as log:
            log.write(said + "\n")
