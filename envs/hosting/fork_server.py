"""Processes of replicas, forked from an interpreter that has already imported what each of them needs.

    owner of replicas                     fork server, one per thread         child, in a session of its own
    fork_server(child).fork  channel  ->  forks                          ->   child(descriptor, parent)
    ForkedProcess.pid                 <-  the child's process id
    ForkedProcess.kill                ->  kills the child and all its descendants in its session
    ForkedProcess.code                <-  its exit code, after its process group is killed and the child reaped

Starting an interpreter takes half a second of CPU time and 50 MB, a fork about 15 ms and 7 MB. A fork server runs no
code of an environment. The kernel kills it when the thread that started it ends, and its children with it.
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

from envs.child_process import child_environment, die_with_parent, import_path
from envs.user_functions import load_function

# Reports about a child: its process id, then its exit code (negative for a signal).
_PID_AND_CODE = struct.Struct("<ii")
_INT = struct.Struct("<i")
_CHANNEL = 3  # a child's only descriptor besides the standard streams

ProcessContext = tuple[dict[str, str], str]  # environment variables and folder

_local = threading.local()  # holds this thread's fork server; the kernel kills it with the thread


class ForkServer:
    """An interpreter to fork from. It ends when the last handle to it is gone."""

    def __init__(self, child: str, context: ProcessContext) -> None:
        self.made_for = child, context
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
                env=context[0],
                start_new_session=True,
            )
        weakref.finalize(self, _end, self._process)

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def fork(self, channel: socket.socket) -> ForkedProcess:
        """A child that serves on this channel; it gets a duplicate of the descriptor."""
        ours, theirs = socket.socketpair()
        with theirs:
            socket.send_fds(self._control, [b"f"], [channel.fileno(), theirs.fileno()])
        return ForkedProcess(self, ours)

    def kill(self) -> None:
        self._process.kill()


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


def fork_server(child: str) -> ForkServer:
    """The fork server of this thread; a new one if it has ended or was started with another environment or folder.

    child: "module:function", called in each child with its channel's descriptor and the fork server's process id.
    """
    context = (child_environment() | {"PYTHONPATH": import_path()}, os.getcwd())
    found: ForkServer | None = getattr(_local, "server", None)
    if found is None or not found.alive or found.made_for != (child, context):
        found = _local.server = ForkServer(child, context)  # children reference their own
    return found


class ForkedProcess:
    """A child of a fork server."""

    def __init__(self, server: ForkServer, status_socket: socket.socket) -> None:
        status_socket.setblocking(False)
        self._server = server
        self._status_socket = status_socket
        self._received = b""

    @property
    def pid(self) -> int:
        """0 until the child is forked."""
        if not self._received:
            with suppress(BlockingIOError, ConnectionResetError):
                self._received = self._status_socket.recv(_INT.size)
        return int(_INT.unpack_from(self._received)[0]) if len(self._received) >= _INT.size else 0

    async def code(self) -> int:
        """The exit code, negative for a signal, once the child has ended; the caller sets the limit."""
        loop = asyncio.get_running_loop()
        while missing := _PID_AND_CODE.size - len(self._received):
            try:
                self._received += await loop.sock_recv(self._status_socket, missing) or self._killed_code()
            except ConnectionResetError:
                self._received += self._killed_code()
        return int(_PID_AND_CODE.unpack(self._received)[1])

    def kill(self, *, overdue: bool = False) -> None:
        """Kill the child's session. overdue: if it was not forked in time, kill the stuck fork server too."""
        if overdue and not self.pid:
            self._server.kill()
        with suppress(BrokenPipeError, ConnectionResetError):  # it was reaped
            self._status_socket.send(b"k")

    def _killed_code(self) -> bytes:
        """The missing bytes of a report if the fork server died, and its children with it."""
        return _PID_AND_CODE.pack(0, -signal.SIGKILL)[len(self._received) :]


def serve(child: str, descriptor: int, parent: int) -> None:
    """Main loop of a fork server's process; in a forked child, the child's function."""
    die_with_parent(parent)
    run = load_function(child)  # its imports are shared by all children
    gc.collect()
    gc.freeze()  # so that the garbage collector does not write to shared pages
    me = os.getpid()
    if _fork_children(socket.socket(fileno=descriptor)):
        np.random.seed()  # siblings must not share numpy's global random state
        run(_CHANNEL, me)
        _exit_child()


def _exit_child() -> None:
    """Exit a child without finalizing the interpreter, which would copy shared pages."""
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _fork_children(control: socket.socket) -> bool:
    """Fork and reap children until the control socket is closed and none is left (False). True in a child."""
    poll = select.poll()
    poll.register(control, select.POLLIN)
    status_sockets: dict[int, int] = {}  # of living children -> process id
    ends: dict[int, int] = {}  # pidfd of a child -> its status socket
    accepting = True
    while accepting or ends:
        # Forks are handled last: new descriptors may reuse the numbers of those just closed.
        for descriptor, _ in sorted(poll.poll(), key=lambda event: event[0] == control.fileno()):
            if descriptor in ends:
                status_socket = ends.pop(descriptor)
                poll.unregister(descriptor)
                with suppress(KeyError):  # unregistered when its owner closed it
                    poll.unregister(status_socket)
                _reap(status_sockets.pop(status_socket), status_socket)
                os.close(descriptor)
            elif descriptor in status_sockets:
                _kill(status_sockets[descriptor])
                if not _read_command(descriptor):
                    poll.unregister(descriptor)
            elif descriptor == control.fileno():
                message, received, _, _ = socket.recv_fds(control, 1, 2)
                if not message:
                    accepting = False
                    poll.unregister(control)
                    continue
                channel, status_socket = received
                try:
                    pid = os.fork()
                except OSError as error:
                    # Too many processes or too little memory: only this replica fails.
                    print(
                        f"envs.hosting.fork_server: a replica's process could not be forked: {error!r}",
                        file=sys.stderr,
                    )
                    os.close(channel)
                    os.close(status_socket)
                    continue
                if not pid:
                    os.setsid()
                    control.detach()
                    _keep_only(channel)
                    return True
                os.close(channel)
                end = os.pidfd_open(pid)
                status_sockets[status_socket], ends[end] = pid, status_socket
                poll.register(end, select.POLLIN)
                poll.register(status_socket, select.POLLIN)
                _report(status_socket, pid)
    return False


def _reap(pid: int, status_socket: int) -> None:
    """Kill a child's process group, reap the child, and report its exit code."""
    _kill(pid)  # before waitpid, so that the pid cannot have been reused
    _report(status_socket, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    os.close(status_socket)


def _keep_only(channel: int) -> None:
    os.dup2(channel, _CHANNEL)
    for descriptor in map(int, os.listdir("/proc/self/fd")):
        if descriptor > _CHANNEL:
            with suppress(OSError):  # the descriptor of the listing itself
                os.close(descriptor)


def _kill(pid: int) -> None:
    # A process that changed its user cannot be killed.
    with suppress(PermissionError):
        try:
            os.killpg(pid, signal.SIGKILL)
        except ProcessLookupError:  # it has not called setsid yet
            os.kill(pid, signal.SIGKILL)


def _report(status_socket: int, number: int) -> None:
    with suppress(BrokenPipeError, ConnectionResetError):  # the owner is gone
        os.write(status_socket, _INT.pack(number))


def _read_command(status_socket: int) -> bytes:
    with suppress(ConnectionResetError):
        return os.read(status_socket, 16)
    return b""
