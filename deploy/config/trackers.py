"""A user's own metric trackers, called during a run besides metrics.jsonl and TensorBoard.

    on_run_start(config, folder)   the configuration as plain JSON, and the run's folder
    on_step(row)                   the row of metrics.jsonl; a step repeated after a loss of the learner comes twice
    on_eval(name, row)             "before", "after" or "step-00000010" ("SUITE/before" of a suite), and the results
    on_run_end(summary)            as in summary.json; None if the run was stopped or failed

They are called in the driver, one after the other, in a thread of their own: a slow tracker delays nothing. The first
error of each tracker is one notice; it is still called afterwards, and never ends the run.
"""

from __future__ import annotations

import inspect
import queue
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from envs.code_lines import describe_error
from rollout.wire.own_part import OwnPart, OwnPartRefused

HOOKS = ("on_run_start", "on_step", "on_eval", "on_run_end")
LAST_SECONDS = 30.0  # limit for the remaining calls when a run ends


class Tracker(Protocol):
    """The methods of a user's class."""

    def on_run_start(self, config: dict[str, Any], folder: Path) -> None: ...

    def on_step(self, row: dict[str, float]) -> None: ...

    def on_eval(self, name: str, row: dict[str, Any]) -> None: ...

    def on_run_end(self, summary: dict[str, Any] | None) -> None: ...


class OwnTracker(OwnPart):
    """The class of a tracker; its options are arguments of its constructor."""

    def check_signature(self, function: Callable[..., Any]) -> None:
        super().check_signature(function)
        missing = [hook for hook in HOOKS if not callable(getattr(function, hook, None))]
        if inspect.isclass(function) and missing:
            raise OwnPartRefused(
                f"{self.kind} has no {' and no '.join(missing)}; add them: a tracker has {', '.join(HOOKS)}"
            )


class Trackers:
    """All trackers of a run. say: prints a notice."""

    def __init__(self, settings: Sequence[OwnTracker], say: Callable[[str], None]) -> None:
        self._settings = settings
        self._say = say
        self._told: set[int] = set()  # positions of trackers whose error was reported
        self._events: queue.SimpleQueue[tuple[str, tuple[Any, ...]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._listen, name="trackers", daemon=True)
        if settings:
            self._thread.start()

    def tell(self, hook: str, *arguments: Any) -> None:
        """Queue a call of every tracker's `hook`; returns at once."""
        if self._thread.is_alive():
            self._events.put((hook, arguments))

    def close(self) -> None:
        """Wait until all calls have returned, at most LAST_SECONDS."""
        if not self._thread.is_alive():
            return
        self._events.put(None)
        self._thread.join(LAST_SECONDS)
        if self._thread.is_alive():
            self._say(
                f"trackers did not return within {LAST_SECONDS:g} s of the run's end; the rest of their calls is "
                "skipped"
            )

    def _listen(self) -> None:
        made = [
            self._guarded(place, "__init__", settings.run) for place, settings in enumerate(self._settings)
        ]
        while event := self._events.get():
            hook, arguments = event
            for place, tracker in enumerate(made):
                if tracker is not None:
                    self._guarded(place, hook, partial(_call, tracker, hook, arguments))

    def _guarded(self, place: int, hook: str, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except Exception as error:  # any error: the code is the user's
            if place not in self._told:
                self._told.add(place)
                kind = self._settings[place].kind
                self._say(f"tracker {kind} failed in {hook}: {describe_error(error)}; the run continues")
            return None


def _call(tracker: Tracker, hook: str, arguments: tuple[Any, ...]) -> None:
    getattr(tracker, hook)(*arguments)
