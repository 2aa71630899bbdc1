"""A thread for calls that may block: the caller awaits the outcome, and its event loop keeps running.

    event loop                          the thread
    ask      a call            ->       makes the call
             <-  an outcome             its result, or the error it raised
    end                        ->       ends after the calls before it

All calls of an environment are made in one thread, because libraries may bind resources to a thread. A thread cannot
be killed. If a call exceeds its limit, CallAbandoned is raised in the thread and the thread is abandoned; it ends when
it next executes Python bytecode. A call into C that holds the GIL stops every thread of the process; such code belongs
in another process.
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

from envs.code_lines import executing_line
from envs.gate import admitted
from envs.user_functions import awaited

_CALLS_PER_CORE = 8  # most slow calls wait for other processes: sandboxes, servers


class CallTimeout(Exception):
    """A call exceeded its time limit; the message names the line of code that its thread is executing."""


class CallAbandoned(BaseException):
    """Raised in an abandoned thread; not caught by `except Exception`."""


@dataclass(slots=True)
class _PendingCall:
    """A call and the future for its outcome."""

    call: Callable[[], Any]
    outcome: asyncio.Future[tuple[Any, BaseException | None]]


def abandon(thread: threading.Thread) -> None:
    """Ask a started thread to end, by raising CallAbandoned where it next executes Python bytecode."""
    assert thread.ident is not None
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(CallAbandoned))


def call_gate() -> asyncio.Semaphore:
    """A semaphore that bounds concurrent calls in this process, by the number of available processors."""
    return asyncio.Semaphore(_CALLS_PER_CORE * len(os.sched_getaffinity(0)))


class CallThread:
    """A thread for one call at a time. Coroutines that calls return are run on one event loop of the thread."""

    def __init__(self, gate: asyncio.Semaphore) -> None:
        self.busy = False  # with a call, possibly one whose caller gave up
        self._gate = gate
        self._loop = asyncio.get_running_loop()
        self._calls: SimpleQueue[_PendingCall | None] = SimpleQueue()
        self._runner = asyncio.Runner()  # opens no event loop before the first coroutine
        # A daemon, so that interpreter exit does not wait for it.
        self.thread = threading.Thread(target=self._run, name="environment", daemon=True)
        self.thread.start()

    async def ask(self, call: Callable[[], Any], seconds: float) -> Any:
        """The result of the call. Raises what the call raises, and CallTimeout. Waiting at the gate has no limit."""
        async with admitted(self._gate):
            pending = _PendingCall(call, self._loop.create_future())
            self.busy = True
            self._calls.put(pending)
            try:
                async with asyncio.timeout(seconds) as clock:
                    value, error = await pending.outcome
            except TimeoutError:
                if not clock.expired():
                    raise
                where = executing_line(self.thread.ident)
                abandon(self.thread)
                raise CallTimeout(where) from None
        self.busy = False
        if error is not None:
            raise error
        return value

    def end(self, last: Callable[[], Any] | None = None) -> None:
        """End the thread, after an optional last call whose outcome is dropped."""
        if last is not None:
            self._calls.put(_PendingCall(last, self._loop.create_future()))
        self._calls.put(None)

    def _run(self) -> None:
        with suppress(CallAbandoned):
            while (pending := self._calls.get()) is not None:
                result = self._execute(pending.call)
                with suppress(RuntimeError):  # the event loop was closed meanwhile
                    self._loop.call_soon_threadsafe(_deliver, pending.outcome, result)
                del pending, result  # an idle thread must not keep an episode alive
            self._runner.close()

    def _execute(self, call: Callable[[], Any]) -> tuple[Any, BaseException | None]:
        try:
            value = call()
            return self._runner.run(awaited(value)) if inspect.isawaitable(value) else value, None
        except CallAbandoned:
            raise
        except BaseException as error:  # user code may raise anything, SystemExit too; the caller decides
            return None, error


def _deliver(outcome: asyncio.Future[Any], result: Any) -> None:
    if not outcome.done():  # the caller was cancelled
        outcome.set_result(result)
