"""A thread beside an event loop that notices when the loop stands, and names the line of code that holds it up.

event loop    says every _BEAT_SECONDS that it goes on
watch         when it has not for _NOTICE_SECONDS: logs the stack of the loop's thread, once, and how long it stood
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

from envs.standing import stands_in

_BEAT_SECONDS = 0.5
_NOTICE_SECONDS = 3.0

log = logging.getLogger(__name__)
log_alone = logging.getLogger("loop_watch")  # not for the console, see rollout.wire.notices


class LoopWatch:
    """Watches the running event loop, from any of its tasks, until `close`.

    stacks_seconds: the interpreter itself writes all stacks to standard error when the loop has stood for so long, also
    where a call into C keeps every thread from running; for one watch of a process. None: it does not.
    """

    def __init__(self, stacks_seconds: float | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._stacks_seconds = stacks_seconds
        self._closed = threading.Event()
        self._beat()
        threading.Thread(target=self._watch, name="loop watch", daemon=True).start()

    def standing(self) -> str:
        """How long the loop has stood and where, in one line; empty while it goes on. For any thread to ask."""
        seconds = time.monotonic() - self._beaten
        if seconds < _NOTICE_SECONDS:
            return ""
        return f"its event loop has stood for {seconds:.0f} s in {stands_in(self._thread)}"

    def close(self) -> None:
        """Watch no more. On the loop."""
        self._closed.set()
        self._timer.cancel()
        if self._stacks_seconds is not None:
            faulthandler.cancel_dump_traceback_later()

    def _beat(self) -> None:
        self._beaten = time.monotonic()
        self._timer = self._loop.call_later(_BEAT_SECONDS, self._beat)
        if self._stacks_seconds is not None:
            faulthandler.dump_traceback_later(self._stacks_seconds)

    def _watch(self) -> None:
        noticed = 0.0  # the beat after which it was found standing
        while not self._closed.wait(_BEAT_SECONDS):
            if noticed and self._beaten != noticed:
                log_alone.warning("the event loop goes on, having stood for %.1f s", self._beaten - noticed)
                noticed = 0.0
            if not noticed and (told := self.standing()):
                noticed = self._beaten
                log.warning("all episodes of a worker wait: %s\n%s", told, _stack(self._thread))


def _stack(thread: int) -> str:
    frame: FrameType | None = sys._current_frames().get(thread)
    return "".join(traceback.format_stack(frame))
