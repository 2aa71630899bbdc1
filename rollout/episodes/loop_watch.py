"""A thread that detects a blocked event loop, and names the line of code that blocks it.

event loop    records a heartbeat every _BEAT_INTERVAL_SECONDS
watch         without one for _BLOCKED_AFTER_SECONDS: logs the stack of the loop's thread, once, and for how long
"""

from __future__ import annotations

import asyncio
import faulthandler
import logging
import sys
import threading
import time
import traceback
from types import FrameType

from envs.code_lines import executing_line

_BEAT_INTERVAL_SECONDS = 0.5
_BLOCKED_AFTER_SECONDS = 3.0

log = logging.getLogger(__name__)
log_alone = logging.getLogger("loop_watch")  # not for the console, see rollout.wire.notices


class LoopWatch:
    """Watches the running event loop until `close`.

    stacks_after_seconds: the interpreter writes all stacks to standard error when the loop was blocked for so long,
    even if a call into C blocks all threads; for one watch per process. None: it does not.
    """

    def __init__(self, stacks_after_seconds: float | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._stacks_after_seconds = stacks_after_seconds
        self._closed = threading.Event()
        self._beat()
        threading.Thread(target=self._watch, name="loop watch", daemon=True).start()

    def standing(self) -> str:
        """For how long the loop has been blocked and where, in one line; empty if it is not. Callable in any thread."""
        seconds = time.monotonic() - self._beaten
        if seconds < _BLOCKED_AFTER_SECONDS:
            return ""
        return f"its event loop has been blocked for {seconds:.0f} s in {executing_line(self._thread)}"

    def close(self) -> None:
        """Stop watching. Call it on the loop."""
        self._closed.set()
        self._timer.cancel()
        if self._stacks_after_seconds is not None:
            faulthandler.cancel_dump_traceback_later()

    def _beat(self) -> None:
        self._beaten = time.monotonic()
        self._timer = self._loop.call_later(_BEAT_INTERVAL_SECONDS, self._beat)
        if self._stacks_after_seconds is not None:
            faulthandler.dump_traceback_later(self._stacks_after_seconds)

    def _watch(self) -> None:
        noticed = 0.0  # the last heartbeat before it was found blocked
        while not self._closed.wait(_BEAT_INTERVAL_SECONDS):
            if noticed and self._beaten != noticed:
                log_alone.warning(
                    "the event loop runs again; it was blocked for %.1f s", self._beaten - noticed
                )
                noticed = 0.0
            if not noticed and (told := self.standing()):
                noticed = self._beaten
                log.warning("all episodes of a worker wait: %s\n%s", told, _stack(self._thread))


def _stack(thread: int) -> str:
    frame: FrameType | None = sys._current_frames().get(thread)
    return "".join(traceback.format_stack(frame))
