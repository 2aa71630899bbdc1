"""A replica in a thread of its own: however long its environment takes, the event loop goes on.

    event loop                                    the replica's thread
    Threaded.start    how to make it      ->      makes the environment
    reset, step       a call              ->      asks the environment
                      <-  an outcome              what it returned, or the error it raised
    close             a call, and the end ->      closes the environment and ends

Everything an environment does happens in this one thread, as libraries expect that bind what they open to a thread. A
thread cannot be killed. A call that takes longer than its limit costs its episode; the thread is asked to end, which it
does when it next executes Python, and is left behind. A call into C that keeps Python's interpreter to itself stops
every thread of its process: environments that may do this belong into a process (env.host.where = "process").
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
from functools import partial
from queue import SimpleQueue
from typing import Any

from envs.base import Observation
from envs.host import Env, EnvironmentFailed, EnvironmentStuck, HostSettings, Inline, Outcome, Sampled
from envs.reference import awaited
from envs.standing import stands_in

_CLOSE_SECONDS = 2.0  # what an environment is given to close
_CALLS_PER_CORE = 8  # most of what takes long waits for other processes: sandboxes, servers


class _LeftBehind(BaseException):
    """Raised in a thread that nobody waits for. An environment's `except Exception` lets it pass."""


@dataclass(slots=True)
class _Asked:
    """One call, and where its outcome goes."""

    call: Callable[[], Any]
    outcome: asyncio.Future[tuple[Any, BaseException | None]]


def call_gate() -> asyncio.Semaphore:
    """Bounds the calls into environments that run at once in this process, by the processors it may use."""
    return asyncio.Semaphore(_CALLS_PER_CORE * len(os.sched_getaffinity(0)))


class Threaded:
    """A `Replica`, one request at a time. Raises whatever the environment raises, and EnvironmentStuck."""

    reusable = True

    def __init__(self, settings: HostSettings, gate: asyncio.Semaphore) -> None:
        self.nondeterministic = False
        self._settings = settings
        self._gate = gate
        self._loop = asyncio.get_running_loop()
        self._asked: SimpleQueue[_Asked | None] = SimpleQueue()
        self._owes_answer = False
        self._sampled: Sampled | None = None
        self._snapshot: bytes | None = None
        self._inline: Inline | None = None
        self._runner = asyncio.Runner()  # of methods that are coroutines; without one it opens nothing
        # A daemon: an interpreter that ends does not wait for it.
        self._thread = threading.Thread(target=self._live, name="environment", daemon=True)

    @classmethod
    async def start(
        cls, make: Callable[[], Env], settings: HostSettings, gate: asyncio.Semaphore
    ) -> Threaded:
        """Make the environment in a new thread."""
        replica = cls(settings, gate)
        replica._thread.start()

        def made() -> bool:
            replica._inline = Inline(make())
            return replica._inline.nondeterministic

        try:
            replica.nondeterministic = await replica._ask("start", settings.start_seconds, made)
        except BaseException:
            await replica.close()
            raise
        return replica

    async def reset(self, seed: int) -> Observation:
        reset = partial(self._reset, seed)
        observation: Observation = await self._ask("reset", self._settings.reset_seconds, reset)
        return observation

    async def step(self, action: str) -> Outcome:
        step = partial(self._step, action)
        outcome: Outcome
        outcome, self._snapshot = await self._ask("step", self._settings.step_seconds, step)
        return outcome

    def sampled(self, sampled: Sampled) -> None:
        self._sampled = sampled  # it goes with the step

    def snapshot(self) -> bytes | None:
        return self._snapshot  # it came with the outcome

    async def restore(self, snapshot: bytes) -> None:
        await self._ask("restore", self._settings.reset_seconds, partial(self._restore, snapshot))

    async def close(self) -> None:
        """Let the environment close, as soon as it returns where it still owes an answer."""
        try:
            if self._inline is None:
                return
            if self._owes_answer:
                self._asked.put(_Asked(self._close, self._loop.create_future()))
            else:
                await self._ask("close", _CLOSE_SECONDS, self._close)
        finally:
            self._asked.put(None)

    async def _ask(self, what: str, seconds: float, call: Callable[[], Any]) -> Any:
        async with self._gate:
            asked = _Asked(call, self._loop.create_future())
            self._owes_answer = True
            self._asked.put(asked)
            try:
                async with asyncio.timeout(seconds) as clock:
                    value, error = await asked.outcome
            except TimeoutError:
                if not clock.expired():
                    raise
                where = stands_in(self._thread.ident)
                self._leave_behind()
                raise EnvironmentStuck(
                    f"it did not {what} within {seconds:g} s ({_limit(what)}); its thread was left behind in {where}"
                ) from None
        self._owes_answer = False
        if error is not None and not isinstance(error, Exception):
            raise EnvironmentFailed(f"it ended with {error!r}") from error
        if error is not None:
            raise error
        return value

    def _leave_behind(self) -> None:
        ident = self._thread.ident
        assert ident is not None
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(ident), ctypes.py_object(_LeftBehind))

    # In the thread ---------------------------------------------------------------------------------------------------

    def _live(self) -> None:
        with suppress(_LeftBehind):
            while (asked := self._asked.get()) is not None:
                told: tuple[Any, BaseException | None]
                try:
                    told = asked.call(), None
                except _LeftBehind:
                    raise
                except BaseException as error:  # anybody's code, which may want to exit
                    told = None, error
                with suppress(RuntimeError):  # the loop has ended meanwhile, and nobody asks any more
                    self._loop.call_soon_threadsafe(_tell, asked.outcome, told)
                del asked, told  # an idle replica holds no episode
            self._runner.close()

    @property
    def _env(self) -> Inline:
        assert self._inline is not None
        return self._inline

    def _reset(self, seed: int) -> Observation:
        observation: Observation = self._settled(self._env.env.reset(seed=seed))[0]
        return observation

    def _step(self, action: str) -> tuple[Outcome, bytes | None]:
        if self._sampled is not None:
            self._env.sampled(self._sampled)
        outcome = self._settled(self._env.env.step(action))
        _, _, terminated, truncated, _ = outcome
        return outcome, None if terminated or truncated else self._env.snapshot()

    def _restore(self, snapshot: bytes) -> None:
        self._env.load(snapshot)

    def _close(self) -> None:
        close: Callable[[], Any] = self._env.env.close
        self._settled(close())

    def _settled(self, value: Any) -> Any:
        return self._runner.run(awaited(value)) if inspect.isawaitable(value) else value


def _tell(outcome: asyncio.Future[Any], told: Any) -> None:
    if not outcome.done():  # nobody waits any more
        outcome.set_result(told)


def _limit(what: str) -> str:
    return {
        "start": "env.host.start_seconds",
        "step": "env.host.step_seconds",
        "close": "what an environment is given to close",
    }.get(what, "env.host.reset_seconds")
