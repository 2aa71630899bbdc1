"""A replica in a child process, which can be killed at any time at the cost of its episode.

    parent                                    child of a fork server (fork_server.py), in a session of its own
    SubprocessEnv.start      factory, pickled  ->    makes the environment
    reset, step       a request         ->    calls the environment
                      <-   an answer          the result, the error it raised, or that it exits
    close             end of file       ->    closes the environment and exits

Requests and answers are a JSON head and some bytes (the factory, a snapshot), over a socket pair. Nothing that comes
from an environment is unpickled; of `info`, only the keys that Manta reads are sent. A process that does not answer in
time is killed. When a process ends, all processes that it started are killed. The kernel kills it when its parent ends.
"""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import signal
import socket
import struct
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import astuple
from typing import Any

from envs.base import Observation, as_number, earlier_end, named_costs, named_rewards, seat_of
from envs.child_process import die_with_parent
from envs.code_lines import describe_error
from envs.hosting.fork_server import ForkedProcess, fork_server
from envs.hosting.host import (
    CLOSE_SECONDS,
    Env,
    EnvironmentFailed,
    EnvironmentRefused,
    EnvironmentTimeout,
    HostSettings,
    InProcessEnv,
    Outcome,
    TokenUsage,
    limit_text,
)
from envs.registry import EnvironmentUnknown
from envs.tools.tool import ToolRefused
from envs.tools.tool_env import call_outcomes

_LENGTHS = struct.Struct("<II")  # of the JSON and of the bytes after it
_KEYS = ("success", "malformed")
CHILD = "envs.hosting.subprocess_env:serve"  # entry point of a replica's process

Frame = tuple[dict[str, Any], bytes]


class RemoteTraceback(Exception):
    """The traceback of an error in a replica's process, set as the cause of the error here."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


class SubprocessEnv:
    """A `Replica` in a child process, one request at a time. Raises EnvironmentFailed if the process dies or hangs."""

    reusable = True

    def __init__(self, process: ForkedProcess, channel: socket.socket, settings: HostSettings) -> None:
        self.nondeterministic = False
        self._process = process
        self._channel = channel
        self._settings = settings
        self._loop = asyncio.get_running_loop()
        self._snapshot: bytes | None = None
        self._sampled = TokenUsage(0, 0, cut=False)
        self._awaiting_answer = False

    @classmethod
    async def start(cls, factory: Callable[[], Env] | bytes, settings: HostSettings) -> SubprocessEnv:
        """Start a process and make the environment there with `factory`: a picklable callable, or its pickle."""
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        with theirs:
            # A fork server ends with the thread that starts it, which must be the event loop's thread.
            process = fork_server(CHILD).fork(theirs)
        replica = cls(process, ours, settings)
        try:
            carried = factory if isinstance(factory, bytes) else pickle.dumps(factory)
            head, _ = await replica._ask("start", {}, settings.start_seconds, carried)
        except BaseException:
            await replica.close()
            raise
        replica.nondeterministic = head["nondeterministic"]
        return replica

    @property
    def pid(self) -> int:
        return self._process.pid

    async def reset(self, seed: int) -> Observation:
        head, _ = await self._ask("reset", {"seed": seed}, self._settings.reset_seconds)
        observation: Observation = head["observation"]
        return observation

    async def step(self, action: str) -> Outcome:
        asked = {"action": action, "sampled": astuple(self._sampled)}
        head, blob = await self._ask("step", asked, self._settings.step_seconds)
        self._snapshot = blob if head["snapshot"] else None
        return head["observation"], head["reward"], head["terminated"], head["truncated"], head["info"]

    def sampled(self, sampled: TokenUsage) -> None:
        self._sampled = sampled  # sent with the next step

    def snapshot(self) -> bytes | None:
        return self._snapshot  # received with the step's answer

    async def restore(self, snapshot: bytes) -> None:
        await self._ask("restore", {}, self._settings.reset_seconds, snapshot)

    async def close(self) -> None:
        """Close the environment, unless a request is still unanswered, and end its process."""
        self._channel.close()
        try:
            if not self._awaiting_answer:
                await self._exit_code(CLOSE_SECONDS)
        finally:
            self._process.kill()
        await self._exit_code(CLOSE_SECONDS)

    async def _ask(self, what: str, head: dict[str, Any], seconds: float, blob: bytes = b"") -> Frame:
        self._awaiting_answer = True
        try:
            async with asyncio.timeout(seconds) as clock:
                await self._loop.sock_sendall(self._channel, _encode({"what": what} | head, blob))
                answer, blob = await self._received()
        except TimeoutError:
            if not clock.expired():
                raise
            self._process.kill(overdue=True)
            raise EnvironmentTimeout(
                f"its process {self.pid} did not answer within {limit_text(what, seconds)} and was killed"
            ) from None
        except (ConnectionError, EOFError):
            code = await self._exit_code(CLOSE_SECONDS)
            raise EnvironmentFailed(f"its process {self.pid} died with {_exit_text(code)}") from None
        if "exits" in answer:
            code = await self._exit_code(CLOSE_SECONDS)
            raise EnvironmentFailed(f"its process {self.pid} died with {_exit_text(code)}: {answer['exits']}")
        self._awaiting_answer = False
        if "error" in answer:
            failed = EnvironmentRefused if answer["refused"] else EnvironmentFailed
            raise failed(answer["error"]) from RemoteTraceback(answer["traceback"])
        return answer, blob

    async def _received(self) -> Frame:
        head, blob = _LENGTHS.unpack(await self._exactly(_LENGTHS.size))
        body = await self._exactly(head + blob)
        return json.loads(body[:head]), body[head:]

    async def _exactly(self, length: int) -> bytes:
        parts = []
        while length:
            part = await self._loop.sock_recv(self._channel, length)
            if not part:
                raise EOFError
            parts.append(part)
            length -= len(part)
        return b"".join(parts)

    async def _exit_code(self, seconds: float) -> int | None:
        """The exit code, negative for a signal; None if the process is still alive after the limit."""
        try:
            async with asyncio.timeout(seconds):
                return await self._process.code()
        except TimeoutError:
            return None


@contextmanager
def resets_in_subprocess(
    factory: Callable[[], Env], settings: HostSettings
) -> Iterator[Callable[[int], Observation]]:
    """A replica in a process, for callers without an event loop: yields its `reset`."""
    with asyncio.Runner() as runner:
        replica = runner.run(SubprocessEnv.start(factory, settings))
        try:
            yield lambda seed: runner.run(replica.reset(seed))
        finally:
            runner.run(replica.close())


def _exit_text(code: int | None) -> str:
    if code is None:
        return "its connection closed, though it still runs"
    return f"exit code {code}" if code >= 0 else f"exit code {code} ({signal.Signals(-code).name})"


def _encode(head: dict[str, Any], blob: bytes) -> bytes:
    text = json.dumps(head).encode()
    return _LENGTHS.pack(len(text), len(blob)) + text + blob


def serve(descriptor: int, parent: int) -> None:
    """Entry point of a replica's process; returns when the parent closes the channel."""
    die_with_parent(parent)
    os.set_inheritable(descriptor, False)  # processes of the environment must not inherit the channel
    # Raised if the parent ended; the kernel is about to kill this process.
    with suppress(ConnectionResetError, BrokenPipeError):
        asyncio.run(_serve(socket.socket(fileno=descriptor)))


async def _serve(channel: socket.socket) -> None:
    # Nothing else runs on this event loop, so reads may block it.
    replica: InProcessEnv | None = None
    with channel, channel.makefile("rb") as requests:
        while lengths := requests.read(_LENGTHS.size):
            head_length, blob_length = _LENGTHS.unpack(lengths)
            head, blob = json.loads(requests.read(head_length)), requests.read(blob_length)
            try:
                if replica is None:
                    replica = InProcessEnv(pickle.loads(blob)())
                answer = _encode(*await _answer(replica, head, blob))
            except SystemExit as error:
                channel.sendall(_encode({"exits": describe_error(error)}, b""))
                raise
            # The environment is user code and may raise anything; the parent decides what to do.
            except Exception as error:
                refused = isinstance(error, EnvironmentUnknown | ToolRefused)
                failure = {"error": str(error) if refused else describe_error(error), "refused": refused}
                answer = _encode(failure | {"traceback": traceback.format_exc()}, b"")
            channel.sendall(answer)
    if replica is not None:
        await replica.close()


async def _answer(replica: InProcessEnv, request: dict[str, Any], blob: bytes) -> Frame:
    match request["what"]:
        case "start":
            return {"nondeterministic": replica.nondeterministic}, b""
        case "reset":
            return {"observation": await replica.reset(request["seed"])}, b""
        case "restore":
            await replica.restore(blob)
            return {}, b""
        case what:
            assert what == "step"
            replica.sampled(TokenUsage(*request["sampled"]))
            observation, reward, terminated, truncated, info = await replica.step(request["action"])
            snapshot = None if terminated or truncated else replica.snapshot()
            verdicts: dict[str, Any] = {key: bool(info[key]) for key in _KEYS if info.get(key) is not None}
            if (named := named_rewards(info)) is not None:
                verdicts["rewards"] = named
            if costs := named_costs(info):
                verdicts["costs"] = costs
            verdicts |= earlier_end(info)
            if reasons := call_outcomes(info):
                verdicts["tools"] = reasons
            if (seat := seat_of(info)) is not None:
                verdicts["seat"] = seat
            answer = {
                "observation": observation,
                "reward": as_number(reward, "the reward"),
                "terminated": bool(terminated),
                "truncated": bool(truncated),
                "info": verdicts,
                "snapshot": snapshot is not None,
            }
            return answer, snapshot or b""
