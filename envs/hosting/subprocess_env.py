"""A replica in a process of its own: whatever it does there, it can be cut short, and it costs its episode only.

    parent                                    child of a fork server (fork_server.py), in a session of its own
    SubprocessEnv.start      recipe, pickled   ->    makes the environment
    reset, step       a request         ->    asks the environment
                      <-   an answer          what it says, or the error it raised, or that it exits
    close             end of file       ->    closes the environment and ends

Requests and answers are a head in JSON and some bytes (the recipe, a snapshot), over a socket pair. Nothing that comes
from an environment is unpickled: of `info` there come the keys that mean something to Manta. A process that does not
answer in time is killed. However a process ends, what it has started and left behind is killed with it. It is killed by
the kernel when its parent ends, however that ends.
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

from envs.base import Observation, as_number, end_behind, named_rewards, seat_of
from envs.child_process import end_with
from envs.hosting.fork_server import Forked, fork_server
from envs.hosting.host import (
    Env,
    EnvironmentFailed,
    EnvironmentRefused,
    EnvironmentStuck,
    HostSettings,
    InProcessEnv,
    Outcome,
    Sampled,
)
from envs.own_frames import told
from envs.registry import EnvironmentUnknown
from envs.tools.tool import ToolRefused
from envs.tools.tool_env import answers_by_reason

_CLOSE_SECONDS = 2.0  # what an environment is given to close
_LENGTHS = struct.Struct("<II")  # of the JSON and of the bytes behind it
_INFO = ("success", "malformed")  # verdicts
CHILD = "envs.hosting.subprocess_env:serve"  # what a process of a replica runs

Message = tuple[dict[str, Any], bytes]


class RemoteTraceback(Exception):
    """The traceback of an error in a replica's process, as the cause of the error here."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


class SubprocessEnv:
    """A `Replica`, one request at a time. Raises EnvironmentFailed where the process died or gave no answer."""

    reusable = True

    def __init__(self, process: Forked, channel: socket.socket, settings: HostSettings) -> None:
        self.nondeterministic = False
        self._process = process
        self._channel = channel
        self._settings = settings
        self._loop = asyncio.get_running_loop()
        self._snapshot: bytes | None = None
        self._sampled = Sampled(0, 0, cut=False)
        self._owes_answer = False

    @classmethod
    async def start(cls, recipe: Callable[[], Env] | bytes, settings: HostSettings) -> SubprocessEnv:
        """Start a process and have it make its environment by `recipe`: pickled, or what pickle is able to carry."""
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        with theirs:
            # A fork server ends with the thread that starts it: let that be the event loop's own.
            process = fork_server(CHILD).fork(theirs)
        replica = cls(process, ours, settings)
        try:
            carried = recipe if isinstance(recipe, bytes) else pickle.dumps(recipe)
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

    def sampled(self, sampled: Sampled) -> None:
        self._sampled = sampled  # it goes with the step

    def snapshot(self) -> bytes | None:
        return self._snapshot  # it came with the answer

    async def restore(self, snapshot: bytes) -> None:
        await self._ask("restore", {}, self._settings.reset_seconds, snapshot)

    async def close(self) -> None:
        """Let the environment close, unless it still owes an answer, and see its process ended."""
        self._channel.close()
        try:
            if not self._owes_answer:
                await self._exit_code(_CLOSE_SECONDS)
        finally:
            self._process.kill()
        await self._exit_code(_CLOSE_SECONDS)

    async def _ask(self, what: str, head: dict[str, Any], seconds: float, blob: bytes = b"") -> Message:
        self._owes_answer = True
        try:
            async with asyncio.timeout(seconds) as clock:
                await self._loop.sock_sendall(self._channel, _framed({"what": what} | head, blob))
                answer, blob = await self._received()
        except TimeoutError:
            if not clock.expired():
                raise
            self._process.kill(overdue=True)
            raise EnvironmentStuck(
                f"its process {self.pid} did not answer within {seconds:g} s (env.host.{_limit(what)}) and was killed"
            ) from None
        except (ConnectionError, EOFError):
            code = await self._exit_code(_CLOSE_SECONDS)
            raise EnvironmentFailed(f"its process {self.pid} died with {_told(code)}") from None
        if "exits" in answer:
            code = await self._exit_code(_CLOSE_SECONDS)
            raise EnvironmentFailed(f"its process {self.pid} died with {_told(code)}: {answer['exits']}")
        self._owes_answer = False
        if "error" in answer:
            failed = EnvironmentRefused if answer["refused"] else EnvironmentFailed
            raise failed(answer["error"]) from RemoteTraceback(answer["traceback"])
        return answer, blob

    async def _received(self) -> Message:
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
        """The exit code, negative for a signal; None for a process that is still there after so long."""
        try:
            async with asyncio.timeout(seconds):
                return await self._process.code()
        except TimeoutError:
            return None


@contextmanager
def looked_at(recipe: Callable[[], Env], settings: HostSettings) -> Iterator[Callable[[int], Observation]]:
    """A replica in a process, for where no event loop runs: gives its `reset`. Raises what `SubprocessEnv` raises."""
    with asyncio.Runner() as runner:
        replica = runner.run(SubprocessEnv.start(recipe, settings))
        try:
            yield lambda seed: runner.run(replica.reset(seed))
        finally:
            runner.run(replica.close())


def _limit(what: str) -> str:
    return {"start": "start_seconds", "step": "step_seconds"}.get(what, "reset_seconds")


def _told(code: int | None) -> str:
    if code is None:
        return "its connection closed, though it still runs"
    return f"exit code {code}" if code >= 0 else f"exit code {code} ({signal.Signals(-code).name})"


def _framed(head: dict[str, Any], blob: bytes) -> bytes:
    text = json.dumps(head).encode()
    return _LENGTHS.pack(len(text), len(blob)) + text + blob


def serve(descriptor: int, parent: int) -> None:
    """The life of a replica's process, which begins here and ends with its parent or its parent's word."""
    end_with(parent)
    os.set_inheritable(descriptor, False)  # what the environment starts must not hold the connection open
    # Where the parent has gone, the kernel is about to end this process.
    with suppress(ConnectionResetError, BrokenPipeError):
        asyncio.run(_serve(socket.socket(fileno=descriptor)))


async def _serve(channel: socket.socket) -> None:
    # Nothing else runs on this loop: reading may block it.
    replica: InProcessEnv | None = None
    with channel, channel.makefile("rb") as requests:
        while lengths := requests.read(_LENGTHS.size):
            head_length, blob_length = _LENGTHS.unpack(lengths)
            head, blob = json.loads(requests.read(head_length)), requests.read(blob_length)
            try:
                if replica is None:
                    replica = InProcessEnv(pickle.loads(blob)())
                answer = _framed(*await _answer(replica, head, blob))
            except SystemExit as error:
                channel.sendall(_framed({"exits": told(error)}, b""))
                raise
            # The environment is anybody's code; its error is the parent's to judge.
            except Exception as error:
                refused = isinstance(error, EnvironmentUnknown | ToolRefused)
                failure = {"error": str(error) if refused else told(error), "refused": refused}
                answer = _framed(failure | {"traceback": traceback.format_exc()}, b"")
            channel.sendall(answer)
    if replica is not None:
        await replica.close()


async def _answer(replica: InProcessEnv, request: dict[str, Any], blob: bytes) -> Message:
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
            replica.sampled(Sampled(*request["sampled"]))
            observation, reward, terminated, truncated, info = await replica.step(request["action"])
            snapshot = None if terminated or truncated else replica.snapshot()
            verdicts: dict[str, Any] = {key: bool(info[key]) for key in _INFO if info.get(key) is not None}
            if (named := named_rewards(info)) is not None:
                verdicts["rewards"] = named
            verdicts |= end_behind(info)
            if reasons := answers_by_reason(info):
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
