"""Python source that nobody trusts, run where it can reach nothing and use no more than its limits.

    host                                     sandbox
    run      order, lease, pipes   ->        keep -> init -> the program        (envs.sandbox.child)
             <-  output, reports             all of it dies with the lease or with init

Isolation is bubblewrap's where that is installed and works for this user, else Linux namespaces entered by hand. Both
end in the same place: users, processes, network, IPC and host name of its own, an empty file system in memory with the
Python installation (no packages) read-only and /tmp to write to, no capabilities, and a filter of system calls. Which
of them works is found out by running a small program in it, once a process. docs/security.md says what holds.
"""

from __future__ import annotations

import fcntl
import json
import os
import selectors
import shutil
import signal
import subprocess
import tempfile
import time
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from io import FileIO
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from envs.sandbox import child as sandbox_child
from envs.sandbox.python_files import FLAGS, installation
from envs.sandbox.system_calls import seccomp_filter

START_SECONDS = 30.0  # for the sandbox to be there, before the program's own time begins
END_SECONDS = 10.0  # for everything in it to be dead
MAX_FILES = 1024  # in /tmp
MAX_SIGNALS = 64  # queued and not delivered yet
_PIECE = 1 << 16
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
# The same order of sets and dicts every time; nothing else is in a program's environment.
_ENVIRONMENT = {"PYTHONHASHSEED": "0"}

Isolation = Literal["bubblewrap", "namespaces", "process"]


class Limits(BaseModel):
    """What a program may use: `processes * memory_bytes + disk_bytes` of memory, beside the kernel's tables for it.

    docs/security.md adds up what the kernel may need in the worst case.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    cpu_seconds: int = Field(5, ge=1, description="CPU time that each process may use, seconds")
    wall_seconds: float = Field(
        10.0, gt=0, description="wall-clock time that the program may take, seconds from its start"
    )
    memory_bytes: int = Field(256 << 20, ge=64 << 20, description="address space of each process, bytes")
    processes: int = Field(
        4, ge=1, description="processes and threads that may exist at once, the program itself included"
    )
    open_files: int = Field(64, ge=16, description="files that each process may have open")
    disk_bytes: int = Field(
        16 << 20, ge=1 << 16, description="capacity of the program's /tmp, bytes; no file can be larger"
    )
    output_bytes: int = Field(
        64 << 10,
        ge=0,
        description="bytes that may be written to standard output and to standard error, each; a program that "
        "writes more is killed",
    )


class Reason(StrEnum):
    """Why a program ended."""

    OK = "ok"  # exit status 0
    ERROR = "error"  # another exit status
    TIMED_OUT = "timed_out"
    MEMORY = "memory"  # a MemoryError that it did not catch
    OUTPUT = "output"
    KILLED = "killed"  # by a signal
    REFUSED = "refused"  # it was not run: there is no isolation here


@dataclass(frozen=True)
class Result:
    """What a program wrote, cut at the limit, and its exit status: None where it did not end by itself."""

    stdout: str
    stderr: str
    status: int | None
    reason: Reason


class SandboxFailed(RuntimeError):
    """The sandbox, not the program in it, failed; the message says at what."""


def run(source: str, stdin: str = "", limits: Limits | None = None, allow_unsafe: bool = False) -> Result:
    """Run a Python program and wait for its end. Everything it started is dead when this returns.

    Where no isolation is possible the result is `refused` and its stderr says why in one line; with `allow_unsafe` the
    program then runs as the present user with the limits alone. Raises SandboxFailed where isolation is possible and
    the sandbox broke none the less: that says nothing about the program.
    """
    isolation, _ = isolated()
    if isolation is None:
        if not allow_unsafe:
            return Result("", refusal() or "", None, Reason.REFUSED)
        with tempfile.TemporaryDirectory(prefix="manta-unsafe-") as home:
            return _play("process", source, stdin, limits or Limits(), home)
    return _play(isolation, source, stdin, limits or Limits(), "/tmp")


def refusal() -> str | None:
    """One line that says why nothing is run here and what can be done; None where isolation is possible."""
    isolation, why = isolated()
    if isolation is not None:
        return None
    return (
        f"untrusted programs are not run here: no isolation is possible ({why}); install bubblewrap, allow user "
        "namespaces, or accept the risk with allow_unsafe=true"
    )


@cache
def isolated() -> tuple[Isolation | None, str]:
    """The isolation that works here, found by trying; where none does, None and what was tried."""
    # To root's sandbox bubblewrap would give root's own user, whose processes no limit counts.
    bubblewrap = shutil.which("bwrap") is not None and os.geteuid() != 0
    ways: tuple[Isolation, ...] = ("bubblewrap", "namespaces") if bubblewrap else ("namespaces",)
    tried = []
    for way in ways:
        try:
            result = _play(way, _PROBE, "", Limits(), "/tmp")
        except (SandboxFailed, OSError, subprocess.SubprocessError) as error:
            tried.append(f"{way}: {str(error).splitlines()[0]}")
            continue
        if result.reason is Reason.OK:
            return way, ""
        tried.append(
            f"{way}: the probe ended as {result.reason}: {result.stderr.strip().rpartition(chr(10))[2]}"
        )
    return None, "; ".join(tried)


_PROBE = f"""
import errno, os, socket
assert os.getuid() == {sandbox_child.NOBODY}, "it has another user"
assert os.getpid() <= 3, "it has no processes of its own"
assert not os.path.exists("/etc/passwd") and not os.path.exists("/proc"), "it sees the host's files"
try:
    socket.socket()
except OSError as error:
    assert error.errno == errno.EAFNOSUPPORT
else:
    raise AssertionError("it has sockets")
"""


def _play(isolation: Isolation, source: str, stdin: str, limits: Limits, home: str) -> Result:
    order = _sealed(json.dumps(_order(isolation, source, limits, home)))
    (reports, told), (lease, held) = _pipe(), _pipe()
    with order, reports, told, lease, held:
        handed = (order.fileno(), told.fileno(), lease.fileno())
        process = subprocess.Popen(
            [installation().executable, *FLAGS, sandbox_child.__file__, "keep", *map(str, handed)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=handed,
            cwd="/",
            env={},
            start_new_session=True,
        )
        with process:
            try:
                told.close()  # so that reports end with whoever reports
                seen = _watch(process, stdin.encode(), reports.fileno(), limits)
            finally:
                _end(process, held)
    return _judged(*seen, limits)


def _watch(
    process: subprocess.Popen[bytes], stdin: bytes, reports: int, limits: Limits
) -> tuple[bytes, bytes, str, Reason | None]:
    """Standard output, standard error, reports; and why it was cut short, if it was."""
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None
    into, out, err = process.stdin.fileno(), process.stdout.fileno(), process.stderr.fileno()
    read = {out: bytearray(), err: bytearray(), reports: bytearray()}
    given = memoryview(stdin)
    os.set_blocking(into, False)
    started, deadline = False, time.monotonic() + START_SECONDS
    cut: Reason | None = None
    with selectors.DefaultSelector() as selector:
        selector.register(into, selectors.EVENT_WRITE)
        for descriptor in read:
            selector.register(descriptor, selectors.EVENT_READ)
        while not read.keys().isdisjoint(selector.get_map()) and cut is None:
            left = deadline - time.monotonic()
            if left <= 0:
                cut = Reason.TIMED_OUT
                break
            for key, _ in selector.select(left):
                if key.fd == into:
                    given = given[_written(into, given) :]
                    if not given:
                        selector.unregister(into)
                        process.stdin.close()
                    continue
                piece = os.read(key.fd, _PIECE)
                read[key.fd] += piece
                if not piece:
                    selector.unregister(key.fd)
            if max(len(read[out]), len(read[err])) > limits.output_bytes:
                cut = Reason.OUTPUT
            if not started and b"started\n" in read[reports]:
                started, deadline = True, time.monotonic() + limits.wall_seconds
    kept = slice(0, limits.output_bytes)
    return bytes(read[out][kept]), bytes(read[err][kept]), read[reports].decode(), cut


def _written(descriptor: int, given: memoryview) -> int:
    """How much of its standard input a program took; all where it reads no more."""
    try:
        return os.write(descriptor, given)
    except BrokenPipeError:
        return len(given)


def _end(process: subprocess.Popen[bytes], lease: FileIO) -> None:
    lease.write(b".")  # rather than closing it: another process forked from here may hold a copy
    try:
        process.wait(END_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise SandboxFailed(f"a sandbox was not dead {END_SECONDS:g} s after it was told to end") from None


def _judged(out: bytes, err: bytes, reports: str, cut: Reason | None, limits: Limits) -> Result:
    stdout, stderr = out.decode(errors="replace"), err.decode(errors="replace")
    lines = dict(line.partition(" ")[::2] for line in reports.splitlines())
    if "failed" in lines:
        raise SandboxFailed(lines["failed"])
    if "started" not in lines:
        late = f"it was not there after {START_SECONDS:g} s" if cut else "it ended before the program began"
        raise SandboxFailed(f"{late}: {stderr.strip()[-500:]}")
    if cut is not None:
        return Result(stdout, stderr, None, cut)
    if "ended" not in lines:  # process 1 itself was killed
        return Result(stdout, stderr, None, Reason.KILLED)
    status, cpu_seconds = lines["ended"].split()
    code = os.waitstatus_to_exitcode(int(status))
    if code == 0:
        return Result(stdout, stderr, 0, Reason.OK)
    if code > 0:
        last = stderr.strip().rpartition("\n")[2]
        return Result(stdout, stderr, code, Reason.MEMORY if last.startswith("MemoryError") else Reason.ERROR)
    slow = code == -signal.SIGXCPU or (code == -signal.SIGKILL and float(cpu_seconds) >= limits.cpu_seconds)
    return Result(stdout, stderr, None, Reason.TIMED_OUT if slow else Reason.KILLED)


def _order(isolation: Isolation, source: str, limits: Limits, home: str) -> dict[str, Any]:
    python = installation()
    # The sandbox's own processes count where the program's user is theirs too.
    own = {"namespaces": 0 if os.geteuid() == 0 else 2, "bubblewrap": 1, "process": 0}[isolation]
    return {
        "isolation": isolation,
        "source": source,
        "home": home,
        "filter": "" if isolation == "process" else seccomp_filter().hex(),
        "python": [python.executable, *FLAGS],
        "environment": _ENVIRONMENT,
        "limits": {
            "RLIMIT_CPU": limits.cpu_seconds,
            "RLIMIT_AS": limits.memory_bytes,
            "RLIMIT_NPROC": limits.processes + own,
            "RLIMIT_NOFILE": limits.open_files,
            "RLIMIT_FSIZE": limits.disk_bytes,
            "RLIMIT_CORE": 1,  # too small for a file; and of 0 a host's crash handler would take no notice
            "RLIMIT_MEMLOCK": 0,
            "RLIMIT_SIGPENDING": MAX_SIGNALS,
        },
        "disk_bytes": limits.disk_bytes,
        "disk_files": MAX_FILES,
        "shown": python.shown,
        "covered": python.covered,
        "command": _bubblewrap(limits) if isolation == "bubblewrap" else [],
    }


def _bubblewrap(limits: Limits) -> list[str]:
    """Its command line, up to the descriptors that are told last; the sandbox's inside comes as text."""
    python = installation()
    command = [
        shutil.which("bwrap") or "bwrap",
        "--unshare-all",
        "--unshare-user",
        "--die-with-parent",
        "--as-pid-1",
    ]
    # For init, which limits the number of files in /tmp: bubblewrap has no option for it. The program gives it up.
    command += ["--cap-drop", "ALL", "--cap-add", "CAP_SYS_ADMIN"]
    command += ["--clearenv", "--hostname", "sandbox"]
    command += ["--uid", str(sandbox_child.NOBODY), "--gid", str(sandbox_child.NOBODY)]
    command += ["--size", str(limits.disk_bytes), "--tmpfs", "/tmp"]
    for source, target in python.shown:
        command += ["--dev-bind" if target.startswith("/dev/") else "--ro-bind", source, target]
    for path in python.covered:
        command += ["--tmpfs", path, "--remount-ro", path]
    command += ["--remount-ro", "/", "--chdir", "/tmp"]
    return [
        *command,
        python.executable,
        *FLAGS,
        "-c",
        Path(sandbox_child.__file__).read_text(encoding="utf-8"),
        "init",
    ]


def _sealed(text: str) -> FileIO:
    """A file in memory that nobody can change, read from its beginning."""
    file = FileIO(os.memfd_create("manta", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING), "r+")
    left = memoryview(text.encode())
    while left:
        left = left[file.write(left) :]
    fcntl.fcntl(file, fcntl.F_ADD_SEALS, _SEALS)
    file.seek(0)
    return file


def _pipe() -> tuple[FileIO, FileIO]:
    read, write = os.pipe()
    return FileIO(read, "r"), FileIO(write, "w")
