"""Processes of replicas, forked from an interpreter that has imported what each of them needs.

    owner of replicas                     fork server, one a thread           child, in a session of its own
    fork_server(child).fork  channel  ->  forks                          ->   child(descriptor, parent)
    Forked.pid                        <-  the child's process id
    Forked.kill                       ->  kills the child with all it has started
    Forked.code                       <-  its exit code, once what it left behind is killed and itself reaped

An interpreter takes half a second of a processor and 50 MB to start, a fork some 15 ms and 7 MB. A fork server runs no
code of an environment. It ends with the thread that started it, and its children end with it.
"""

from __future__ import annotations

import asyncio
import atexit
import gc
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import weakref
from contextlib import suppress

import numpy as np

from envs.child_process import end_with, import_path, inherited
from envs.user_functions import load_function

# What is heard of a child: its process id, then its exit code, a signal's negative.
_NUMBERS = struct.Struct("<ii")
_NUMBER = struct.Struct("<i")
_CHANNEL = 3  # a child's only descriptor besides the standard ones

Surroundings = tuple[dict[str, str], str]  # environment variables and folder

_here = threading.local()  # the fork server of this thread, with which the kernel ends it


class ForkServer:
    """An interpreter to fork from. It is reached by whoever forks only, and ends with the last who could."""

    def __init__(self, child: str, surroundings: Surroundings) -> None:
        self.made_for = child, surroundings
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-c",
                    f"from envs.hosting.fork_server import serve; serve({child!r}, {theirs.fileno()}, {os.getpid()})",
                ],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env=surroundings[0],
                start_new_session=True,
            )
        weakref.finalize(self, _end, self._process)

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def fork(self, channel: socket.socket) -> Forked:
        """A child that serves at this channel, which it gets a copy of."""
        ours, theirs = socket.socketpair()
        with theirs:
            socket.send_fds(self._control, [b"b"], [channel.fileno(), theirs.fileno()])
        return Forked(self, ours)

    def kill(self) -> None:
        self._process.kill()


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


def fork_server(child: str) -> ForkServer:
    """The one of this thread, started anew where it has ended or a new one would find other surroundings.

    child: "module:function", called in each child with its channel's descriptor and the fork server's process id.
    """
    surroundings = (inherited() | {"PYTHONPATH": import_path()}, os.getcwd())
    found: ForkServer | None = getattr(_here, "server", None)
    if found is None or not found.alive or found.made_for != (child, surroundings):
        found = _here.server = ForkServer(child, surroundings)  # children keep the one they are of
    return found


class Forked:
    """A child of a fork server."""

    def __init__(self, of: ForkServer, leash: socket.socket) -> None:
        leash.setblocking(False)
        self._server = of
        self._leash = leash
        self._heard = b""

    @property
    def pid(self) -> int:
        """0 until it is born."""
        if not self._heard:
            with suppress(BlockingIOError, ConnectionResetError):
                self._heard = self._leash.recv(_NUMBER.size)
        return int(_NUMBER.unpack_from(self._heard)[0]) if len(self._heard) >= _NUMBER.size else 0

    async def code(self) -> int:
        """The exit code, negative for a signal, once it has ended; the limit is the caller's."""
        loop = asyncio.get_running_loop()
        while missing := _NUMBERS.size - len(self._heard):
            try:
                self._heard += await loop.sock_recv(self._leash, missing) or self._orphaned()
            except ConnectionResetError:
                self._heard += self._orphaned()
        return int(_NUMBERS.unpack(self._heard)[1])

    def kill(self, *, overdue: bool = False) -> None:
        """Kill it with all it has started. overdue: it is late; where it is not even born the fork server is stuck."""
        if overdue and not self.pid:
            self._server.kill()
        with suppress(BrokenPipeError, ConnectionResetError):  # it is buried
            self._leash.send(b"k")

    def _orphaned(self) -> bytes:
        """What is missing of what is heard, where the fork server is gone and has taken its children with it."""
        return _NUMBERS.pack(0, -signal.SIGKILL)[len(self._heard) :]


def serve(child: str, descriptor: int, parent: int) -> None:
    """The life of a fork server's process, and from its birth on a child's."""
    end_with(parent)
    run = load_function(child)  # with all that it imports: what is shared by every child
    gc.collect()
    gc.freeze()  # the collector would write to what is shared
    me = os.getpid()
    if _fork_children(socket.socket(fileno=descriptor)):
        np.random.seed()  # numpy's global generator is shared too, and siblings must not draw alike
        run(_CHANNEL, me)
        _leave()


def _leave() -> None:
    """End a child without taking the interpreter apart, which would copy all that is shared."""
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _fork_children(control: socket.socket) -> bool:
    """Bear children until nobody could ask for one more and none is left: False. True: this is a child."""
    poll = select.poll()
    poll.register(control, select.POLLIN)
    leashes: dict[int, int] = {}  # of the children that live, to their process ids
    ends: dict[int, int] = {}  # what tells that a child ended, to its leash
    asked = True
    while asked or ends:
        # A birth comes last: its descriptors may have the numbers of those that were closed just now.
        for descriptor, _ in sorted(poll.poll(), key=lambda event: event[0] == control.fileno()):
            if descriptor in ends:
                leash = ends.pop(descriptor)
                poll.unregister(descriptor)
                with suppress(KeyError):  # whoever had it may be gone
                    poll.unregister(leash)
                _reap(leashes.pop(leash), leash)
                os.close(descriptor)
            elif descriptor in leashes:
                _kill(leashes[descriptor])
                if not _heard(descriptor):
                    poll.unregister(descriptor)
            elif descriptor == control.fileno():
                message, received, _, _ = socket.recv_fds(control, 1, 2)
                if not message:
                    asked = False
                    poll.unregister(control)
                    continue
                channel, leash = received
                try:
                    pid = os.fork()
                except OSError as error:
                    # Too many processes, or too little memory: that one's misfortune alone.
                    print(
                        f"envs.hosting.fork_server: a replica's process could not be forked: {error!r}",
                        file=sys.stderr,
                    )
                    os.close(channel)
                    os.close(leash)
                    continue
                if not pid:
                    os.setsid()
                    control.detach()
                    _keep_only(channel)
                    return True
                os.close(channel)
                end = os.pidfd_open(pid)
                leashes[leash], ends[end] = pid, leash
                poll.register(end, select.POLLIN)
                poll.register(leash, select.POLLIN)
                _say(leash, pid)
    return False


def _reap(pid: int, leash: int) -> None:
    """See to the end of a child and of what it left behind, and tell who had it."""
    _kill(pid)  # until it is waited for, its group has its id and no other process can get it
    _say(leash, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    os.close(leash)


def _keep_only(channel: int) -> None:
    os.dup2(channel, _CHANNEL)
    for descriptor in map(int, os.listdir("/proc/self/fd")):
        if descriptor > _CHANNEL:
            with suppress(OSError):  # the one that the list was read by
                os.close(descriptor)


def _kill(pid: int) -> None:
    # What has taken another user's id is not ours to kill.
    with suppress(PermissionError):
        try:
            os.killpg(pid, signal.SIGKILL)
        except ProcessLookupError:  # it is too young to have a session of its own
            os.kill(pid, signal.SIGKILL)


def _say(leash: int, number: int) -> None:
    with suppress(BrokenPipeError, ConnectionResetError):  # nobody asks
        os.write(leash, _NUMBER.pack(number))


def _heard(leash: int) -> bytes:
    with suppress(ConnectionResetError):
        return os.read(leash, 16)
    return b""
