"""A running foreign agent: a program in its own process, or a function in this one.

A program finds the policy at OPENAI_BASE_URL with OPENAI_API_KEY, and its task as JSON in MANTA_TASK; a function is
called with these three. A program has its own session, is killed with its process group, and by the kernel when the
thread that started it ends. A function runs in a thread, with its own event loop if it is async. A thread cannot be
killed, but its next request is refused.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol

from envs.child_process import bound_to_parent, child_environment, import_path
from envs.code_lines import describe_error
from envs.user_functions import load_function, settled
from rollout.external.openai_format import read_json
from rollout.external.session import EpisodeVerdict, ProgramExit

Function = Callable[..., Any]  # (base_url, api_key, task)
OnExit = Callable[[ProgramExit], None]

_KEPT_BYTES = 1 << 16  # of a program's output, from its end
_SHOWN_CHARACTERS = 2000  # of these in an error
_DRAIN_TIMEOUT_SECONDS = 1.0  # to read the output after the exit
_CLOSE_TIMEOUT_SECONDS = 2.0  # for a killed program to exit


class RunningAgent(Protocol):
    """A foreign agent that was started; it reports its exit once, unless `end` comes first."""

    def said(self) -> str:
        """The end of its output, for an error's text; empty if there is none."""

    async def end(self, grace: float = 0.0) -> None:
        """End it; it has `grace` seconds to exit by itself."""


def environment(base_url: str, api_key: str, task: dict[str, Any]) -> dict[str, str]:
    """Environment variables of a program: the inherited ones, the policy's address, and the task."""
    direct = [part for name in ("no_proxy", "NO_PROXY") if (part := os.environ.get(name))]
    without_proxy = ",".join([*direct[:1], "127.0.0.1"])
    return child_environment() | {
        "OPENAI_BASE_URL": base_url,
        "OPENAI_API_KEY": api_key,
        "MANTA_TASK": json.dumps(task),
        "no_proxy": without_proxy,
        "NO_PROXY": without_proxy,
    }


def as_command(reference: str) -> tuple[list[str], dict[str, str]]:
    """A function as a program: its command, and additional environment variables."""
    return [sys.executable, "-m", "rollout.external.program", reference], {"PYTHONPATH": import_path()}


class ProgramAgent:
    """A `RunningAgent` process."""

    def __init__(self, process: subprocess.Popen[bytes], on_exit: OnExit) -> None:
        self._process = process
        self._on_exit = on_exit
        self._out, self._err = _Tail(), _Tail()
        self._life: asyncio.Task[None] | None = None

    @classmethod
    async def start(cls, command: Sequence[str], environ: dict[str, str], on_exit: OnExit) -> ProgramAgent:
        """Start a command. OSError if the system refuses; a command that does not exist exits with status 1."""
        process = subprocess.Popen(
            bound_to_parent(command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environ,
            start_new_session=True,
        )
        program = cls(process, on_exit)
        program._life = asyncio.create_task(program._live(), name=f"program {process.pid}")
        loop = asyncio.get_running_loop()
        try:
            await loop.connect_read_pipe(lambda: program._out, process.stdout)
            await loop.connect_read_pipe(lambda: program._err, process.stderr)
        except BaseException:
            program._kill()
            raise
        return program

    @property
    def pid(self) -> int:
        return self._process.pid

    def said(self) -> str:
        said = (self._err.text.strip() or self._out.text.strip())[-_SHOWN_CHARACTERS:]
        return f"; it said last:\n{said}" if said else ""

    async def end(self, grace: float = 0.0) -> None:
        assert self._life is not None
        if grace:
            await asyncio.wait({self._life}, timeout=grace)
        if not self._life.done():
            self._kill()
            await asyncio.wait({self._life}, timeout=_CLOSE_TIMEOUT_SECONDS)

    async def _live(self) -> None:
        exited = asyncio.Event()
        loop = asyncio.get_running_loop()
        descriptor = os.pidfd_open(self.pid)
        loop.add_reader(descriptor, exited.set)
        try:
            await exited.wait()  # until it exits, or `end` kills it
        finally:
            loop.remove_reader(descriptor)
            os.close(descriptor)
        # Before `wait` reaps it, its process group's id cannot be reused.
        self._kill()
        code = self._process.wait()
        await asyncio.wait({self._out.closed, self._err.closed}, timeout=_DRAIN_TIMEOUT_SECONDS)
        self._out.close()
        self._err.close()
        self._on_exit(self._told(code))

    def _told(self, code: int) -> ProgramExit:
        output = self._out.text
        if code == 0:
            return ProgramExit(None, output, _last_line(output))
        how = f"exit code {code}" if code > 0 else f"signal {-code} ({signal.strsignal(-code)})"
        return ProgramExit(f"its program ended with {how}{self.said()}", output)

    def _kill(self) -> None:
        if self._process.returncode is None:
            # A process that runs as another user cannot be killed.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)


class FunctionAgent:
    """A `RunningAgent` function in a thread of this process; coroutines run on an event loop of that thread."""

    def __init__(
        self, function: Function, base_url: str, api_key: str, task: dict[str, Any], on_exit: OnExit
    ) -> None:
        self._on_exit = on_exit
        self._left = asyncio.Event()
        self._ended = False
        self._waiting: tuple[asyncio.AbstractEventLoop, asyncio.Task[Any]] | None = None
        in_thread(lambda: self._settled(function(base_url, api_key, task)), "its function", self._leave)

    def said(self) -> str:
        return ""

    async def end(self, grace: float = 0.0) -> None:
        if self._waiting is None and not self._left.is_set():
            self._ended = True  # not a coroutine yet: a thread cannot be killed
            return
        if not await self._has_left(grace) and self._waiting is not None:
            loop, task = self._waiting
            with contextlib.suppress(RuntimeError):  # its loop may have ended meanwhile
                loop.call_soon_threadsafe(task.cancel)
            await self._has_left(_CLOSE_TIMEOUT_SECONDS)

    async def _has_left(self, seconds: float) -> bool:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._left.wait(), seconds)
        return self._left.is_set()

    def _leave(self, left: ProgramExit) -> None:
        self._left.set()
        self._on_exit(left)

    # In the thread.

    def _settled(self, value: Any) -> Any:
        with contextlib.suppress(asyncio.CancelledError):
            return asyncio.run(self._awaited(value)) if inspect.isawaitable(value) else value

    async def _awaited(self, value: Awaitable[Any]) -> Any:
        task = asyncio.current_task()
        assert task is not None
        self._waiting = asyncio.get_running_loop(), task
        if self._ended:
            raise asyncio.CancelledError
        return await value


class _Tail(asyncio.Protocol):
    """Keeps the last bytes of a pipe."""

    def __init__(self) -> None:
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._kept = b""
        self._transport: asyncio.BaseTransport | None = None

    @property
    def text(self) -> str:
        return self._kept.decode(errors="replace")

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._kept = (self._kept + data)[-_KEPT_BYTES:]

    def connection_lost(self, error: Exception | None) -> None:
        if not self.closed.done():
            self.closed.set_result(None)

    def close(self) -> None:
        """Stop reading, even if a surviving child of the program holds the other end."""
        if self._transport is not None:
            self._transport.close()


def in_thread(call: Callable[[], Any], what: str, on_exit: OnExit) -> None:
    """Call foreign code in its own thread, and report its exit on this event loop. what: its name in errors."""
    loop = asyncio.get_running_loop()

    def run() -> None:
        try:
            left = ProgramExit(None, "", call())
        except (
            Exception,
            SystemExit,
        ) as error:  # foreign code; a thread would swallow SystemExit
            left = _raised(what, error)
        with contextlib.suppress(RuntimeError):  # the loop may have ended meanwhile
            loop.call_soon_threadsafe(on_exit, left)

    # A daemon thread: code that never returns must not keep the worker from exiting.
    threading.Thread(target=run, name=f"foreign code: {what}"[:64], daemon=True).start()


def _raised(what: str, error: BaseException) -> ProgramExit:
    return ProgramExit(f"{what} raised {describe_error(error)}", "", error=error)


def _last_line(output: str) -> Any:
    """Parse the last line if it is a JSON object; a bare number could be any output of the program."""
    said = next((line for line in reversed(output.split("\n")) if line.strip()), "")
    try:
        result = read_json(said)
    except ValueError:
        return None
    return result if isinstance(result, dict) else None


def main(reference: str) -> None:
    """Run a function as a program; its result is printed as the last line."""
    task = json.loads(os.environ["MANTA_TASK"])
    function = load_function(reference)
    result = settled(function(os.environ["OPENAI_BASE_URL"], os.environ["OPENAI_API_KEY"], task))
    if result is not None:
        print("\n" + EpisodeVerdict.read(result).model_dump_json())


if __name__ == "__main__":
    main(sys.argv[1])
