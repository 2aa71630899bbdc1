"""How a run is told to stop: SIGTERM and Ctrl-C where it has the main thread, a request where it has another.

A notebook's event loop has the main thread, so a run that is started from a cell gets a thread and a loop of its own;
interrupting the cell asks that thread to end.
"""

from __future__ import annotations

import asyncio
import contextvars
import signal
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, wait
from typing import Any, TypeVar

T = TypeVar("T")
INTERRUPTED = 130  # exit status of a run that was told to stop: what a shell reports for Ctrl-C
_LOOK_SECONDS = 0.5


class Stopped(Exception):
    """SIGTERM came, or a notebook's cell was interrupted."""


class _Request:
    """A request to stop, which may come before there is anything that could be stopped."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stop: Callable[[], object] | None = None
        self._asked = False

    def ask(self) -> None:
        with self._lock:
            self._asked = True
            if self._stop is not None:
                self._stop()

    def answered_by(self, stop: Callable[[], object] | None) -> None:
        with self._lock:
            self._stop = stop
            if self._asked and stop is not None:
                stop()


_request: contextvars.ContextVar[_Request | None] = contextvars.ContextVar("request", default=None)


async def interruptible(work: Coroutine[Any, Any, T]) -> T:
    """Await the work; Stopped where it is told to stop meanwhile."""
    task, loop = asyncio.current_task(), asyncio.get_running_loop()
    assert task is not None
    told = asyncio.Event()

    def stop() -> None:
        if (
            not told.is_set()
        ):  # told twice, as by Ray and by `--retries`: the end that is under way is not cut short
            told.set()
            task.cancel()

    request = _request.get()
    if request is not None:
        request.answered_by(lambda: loop.call_soon_threadsafe(stop))
    elif threading.current_thread() is threading.main_thread():
        # Not by way of SIGINT: a process in the background may have been told to ignore that one.
        loop.add_signal_handler(signal.SIGTERM, stop)
    try:
        return await work
    except asyncio.CancelledError:
        if told.is_set():
            raise Stopped from None
        raise
    finally:
        if request is not None:
            request.answered_by(None)


def beside_a_loop(call: Callable[[], T]) -> T:
    """Call a function that runs event loops: here, or in a thread of its own where this thread's loop is running.

    Returns what it returns and raises what it raises. KeyboardInterrupt, which only the main thread gets, stops the
    function's `interruptible` work and is raised when the function has ended.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return call()
    outcome: Future[T] = Future()
    request = _Request()

    def body() -> None:
        _request.set(request)
        try:
            outcome.set_result(call())
        except BaseException as error:  # for the caller's thread, where it is raised
            outcome.set_exception(error)

    thread = threading.Thread(target=contextvars.copy_context().run, args=(body,), name="run", daemon=True)
    try:
        thread.start()
        while not outcome.done():
            wait([outcome], _LOOK_SECONDS)  # a wait without end would not always notice the interrupt
    except KeyboardInterrupt:
        request.ask()
        wait([outcome])  # not the thread: an interrupted join takes it for ended
        raise
    return outcome.result()
