"""A foreign agent at work: a program in a process of its own, or a function of this one.

Either finds the policy at OPENAI_BASE_URL with OPENAI_API_KEY, and its task as JSON in MANTA_TASK; a function is called
with the three. A program lives in a session of its own, is killed with its process group, and by the kernel when the
thread that started it ends. A function runs in a thread, on an event loop of its own where it is async; a thread cannot
be killed, but its next request is refused.
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

from envs.child_process import import_path, inherited, leashed
from envs.own_frames import told
from envs.user_functions import load_function, settled
from rollout.external.openai_format import read_json
from rollout.external.session import Left, Verdict

Function = Callable[..., Any]  # (base_url, api_key, task)
OnLeft = Callable[[Left], None]

_KEPT_BYTES = 1 << 16  # of what a program prints, the end
_SHOWN_CHARACTERS = 2000  # of that, in an error
_DRAIN_SECONDS = 1.0  # for output to arrive that was printed before the end
_CLOSE_SECONDS = 2.0  # for a killed program to be gone


class Running(Protocol):
    """A foreign agent that was started; it says by itself how it left, once, unless `end` comes first."""

    def said(self) -> str:
        """The end of what it printed, for an error's text; empty where nothing is known."""
        ...

    async def end(self, grace: float = 0.0) -> None:
        """See it ended; it has `grace` seconds to end by itself."""
        ...


def environment(base_url: str, api_key: str, task: dict[str, Any]) -> dict[str, str]:
    """The environment of a program: what it inherits, and where it finds the policy and its task."""
    direct = [part for name in ("no_proxy", "NO_PROXY") if (part := os.environ.get(name))]
    without_proxy = ",".join([*direct[:1], "127.0.0.1"])
    return inherited() | {
        "OPENAI_BASE_URL": base_url,
        "OPENAI_API_KEY": api_key,
        "MANTA_TASK": json.dumps(task),
        "no_proxy": without_proxy,
        "NO_PROXY": without_proxy,
    }


def as_command(reference: str) -> tuple[list[str], dict[str, str]]:
    """A function as a program: the command, and what its environment needs besides."""
    return [sys.executable, "-m", "rollout.external.program", reference], {"PYTHONPATH": import_path()}


class Program:
    """A `Running` process."""

    def __init__(self, process: subprocess.Popen[bytes], on_left: OnLeft) -> None:
        self._process = process
        self._on_left = on_left
        self._out, self._err = _Tail(), _Tail()
        self._life: asyncio.Task[None] | None = None

    @classmethod
    async def start(cls, command: Sequence[str], environ: dict[str, str], on_left: OnLeft) -> Program:
        """Start a command. OSError where the system refuses; a command that does not exist leaves with status 1."""
        process = subprocess.Popen(
            leashed(command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environ,
            start_new_session=True,
        )
        program = cls(process, on_left)
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
            await asyncio.wait({self._life}, timeout=_CLOSE_SECONDS)

    async def _live(self) -> None:
        exited = asyncio.Event()
        loop = asyncio.get_running_loop()
        descriptor = os.pidfd_open(self.pid)
        loop.add_reader(descriptor, exited.set)
        try:
            await exited.wait()  # `end` ends it
        finally:
            loop.remove_reader(descriptor)
            os.close(descriptor)
        # Until it is waited for, its group has its id and no other process can get it.
        self._kill()
        code = self._process.wait()
        await asyncio.wait({self._out.closed, self._err.closed}, timeout=_DRAIN_SECONDS)
        self._out.close()
        self._err.close()
        self._on_left(self._told(code))

    def _told(self, code: int) -> Left:
        output = self._out.text
        if code == 0:
            return Left(None, output, _last_line(output))
        how = f"exit code {code}" if code > 0 else f"signal {-code} ({signal.strsignal(-code)})"
        return Left(f"its program ended with {how}{self.said()}", output)

    def _kill(self) -> None:
        if self._process.returncode is None:
            # What has taken another user's id is not ours to kill.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)


class Called:
    """A `Running` function of this process, in a thread; coroutines run on an event loop of that thread's."""

    def __init__(
        self, function: Function, base_url: str, api_key: str, task: dict[str, Any], on_left: OnLeft
    ) -> None:
        self._on_left = on_left
        self._left = asyncio.Event()
        self._ended = False
        self._waiting: tuple[asyncio.AbstractEventLoop, asyncio.Task[Any]] | None = None
        in_thread(lambda: self._settled(function(base_url, api_key, task)), "its function", self._leave)

    def said(self) -> str:
        return ""

    async def end(self, grace: float = 0.0) -> None:
        if self._waiting is None and not self._left.is_set():
            self._ended = True  # it is no coroutine yet, and a thread cannot be killed
            return
        if not await self._has_left(grace) and self._waiting is not None:
            loop, task = self._waiting
            with contextlib.suppress(RuntimeError):  # it has ended meanwhile
                loop.call_soon_threadsafe(task.cancel)
            await self._has_left(_CLOSE_SECONDS)

    async def _has_left(self, seconds: float) -> bool:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._left.wait(), seconds)
        return self._left.is_set()

    def _leave(self, left: Left) -> None:
        self._left.set()
        self._on_left(left)

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
    """The end of what comes through a pipe."""

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
        """Read no more, even where something that outlived the program holds the other end."""
        if self._transport is not None:
            self._transport.close()


def in_thread(call: Callable[[], Any], what: str, on_left: OnLeft) -> None:
    """Call foreign code in a thread of its own, and say on this event loop how it left; `what` names it in an error."""
    loop = asyncio.get_running_loop()

    def run() -> None:
        try:
            left = Left(None, "", call())
        except (
            Exception,
            SystemExit,
        ) as error:  # it is anybody's code, and a thread would swallow the latter
            left = _raised(what, error)
        with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile, and nobody asks any more
            loop.call_soon_threadsafe(on_left, left)

    # A daemon: one that never returns must keep neither the worker from ending nor a thread that others wait for.
    threading.Thread(target=run, name=f"foreign code: {what}"[:64], daemon=True).start()


def _raised(what: str, error: BaseException) -> Left:
    return Left(f"{what} raised {told(error)}", "", error=error)


def _last_line(output: str) -> Any:
    """The last line where it is a JSON object: a bare number could be anything that a program happens to print."""
    said = next((line for line in reversed(output.split("\n")) if line.strip()), "")
    try:
        result = read_json(said)
    except ValueError:
        return None
    return result if isinstance(result, dict) else None


def main(reference: str) -> None:
    """Call a function as a program would be started; what it returns is the last line."""
    task = json.loads(os.environ["MANTA_TASK"])
    function = load_function(reference)
    result = settled(function(os.environ["OPENAI_BASE_URL"], os.environ["OPENAI_API_KEY"], task))
    if result is not None:
        print("\n" + Verdict.read(result).model_dump_json())


if __name__ == "__main__":
    main(sys.argv[1])
