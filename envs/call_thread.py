"""A thread of its own for calls that may take long: whoever makes them awaits, and its event loop goes on.

    event loop                          the thread
    ask      a call            ->       makes the call
             <-  an outcome             what it returned, or the error it raised
    end                        ->       ends after the calls before it

An environment's calls are all made in one thread, as libraries expect that bind what they open to a thread. A thread
cannot be killed. One whose call takes longer than its limit is asked to end, and left behind: it ends when it next
executes Python. A call into C that keeps Python's interpreter to itself stops every thread of its process: code that
may do this belongs into another process.
"""

from __future__ import annotations

import asyncio
import ctypes
import inspect
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

from envs.gate import admitted
from envs.standing import stands_in
from envs.user_functions import awaited

_CALLS_PER_CORE = 8  # most of what takes long waits for other processes: sandboxes, servers


class Overdue(Exception):
    """A call did not return in time; the message says in which line of code its thread was left behind."""


class LeftBehind(BaseException):
    """Raised in a thread that nobody waits for. An `except Exception` lets it pass."""


@dataclass(slots=True)
class _Asked:
    """One call, and where its outcome goes."""

    call: Callable[[], Any]
    outcome: asyncio.Future[tuple[Any, BaseException | None]]


def leave_behind(thread: threading.Thread) -> None:
    """Ask a started thread to end, by LeftBehind wherever it next executes Python."""
    assert thread.ident is not None
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(LeftBehind))


def call_gate() -> asyncio.Semaphore:
    """Bounds the calls that run at once in this process, by the processors it may use."""
    return asyncio.Semaphore(_CALLS_PER_CORE * len(os.sched_getaffinity(0)))


class CallThread:
    """One call at a time. A call may return a coroutine; all of them run on one event loop of the thread's."""

    def __init__(self, gate: asyncio.Semaphore) -> None:
        self.busy = False  # with a call that nobody waits for any more
        self._gate = gate
        self._loop = asyncio.get_running_loop()
        self._calls: SimpleQueue[_Asked | None] = SimpleQueue()
        self._runner = asyncio.Runner()  # opens nothing before the first coroutine
        # A daemon: an interpreter that ends does not wait for it.
        self.thread = threading.Thread(target=self._live, name="environment", daemon=True)
        self.thread.start()

    async def ask(self, call: Callable[[], Any], seconds: float) -> Any:
        """The call's result; raises what it raises, and Overdue. Waiting at the gate has no limit."""
        async with admitted(self._gate):
            asked = _Asked(call, self._loop.create_future())
            self.busy = True
            self._calls.put(asked)
            try:
                async with asyncio.timeout(seconds) as clock:
                    value, error = await asked.outcome
            except TimeoutError:
                if not clock.expired():
                    raise
                where = stands_in(self.thread.ident)
                leave_behind(self.thread)
                raise Overdue(where) from None
        self.busy = False
        if error is not None:
            raise error
        return value

    def end(self, last: Callable[[], Any] | None = None) -> None:
        """End the thread, after a last call that nobody waits for."""
        if last is not None:
            self._calls.put(_Asked(last, self._loop.create_future()))
        self._calls.put(None)

    def _live(self) -> None:
        with suppress(LeftBehind):
            while (asked := self._calls.get()) is not None:
                told = self._made(asked.call)
                with suppress(RuntimeError):  # the loop has ended meanwhile, and nobody asks any more
                    self._loop.call_soon_threadsafe(_tell, asked.outcome, told)
                del asked, told  # an idle replica holds no episode
            self._runner.close()

    def _made(self, call: Callable[[], Any]) -> tuple[Any, BaseException | None]:
        try:
            value = call()
            return self._runner.run(awaited(value)) if inspect.isawaitable(value) else value, None
        except LeftBehind:
            raise
        except BaseException as error:  # anybody's code, which may want to exit: for whoever asked
            return None, error


def _tell(outcome: asyncio.Future[Any], told: Any) -> None:
    if not outcome.done():  # nobody waits any more
        outcome.set_result(told)
