"""Execution of untrusted Python programs, isolated from the host and within resource limits.

    host                                     sandbox
    run      order, lease, pipes   ->        supervise -> init -> the program   (envs.sandbox.child)
             <-  output, reports             everything is killed when the lease is closed or init ends

Isolation is bubblewrap, if it is installed and works for this user, else Linux namespaces entered by the sandbox
itself. Both give the program its own users, processes, network, IPC and host name; an empty in-memory file system with
the Python installation (no packages) read-only and a writable /tmp; no capabilities; and a system call filter. The
method is chosen by running a small program in it, once per process. docs/security.md states the guarantees.
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

START_SECONDS = 30.0  # to build the sandbox, before the program's own time begins
END_SECONDS = 10.0  # to kill everything in it
MAX_FILES = 1024  # in /tmp
MAX_SIGNALS = 64  # pending
_PIECE = 1 << 16
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
# A program's whole environment: a fixed hash seed makes the order of sets reproducible.
_ENVIRONMENT = {"PYTHONHASHSEED": "0"}

Isolation = Literal["bubblewrap", "namespaces", "process"]


class SandboxLimits(BaseModel):
    """Resource limits of a program. Memory is bounded by `processes * memory_bytes + disk_bytes` plus kernel tables.

    docs/security.md adds up the kernel's memory in the worst case.
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


class ExitReason(StrEnum):
    """Why a program ended."""

    OK = "ok"  # exit status 0
    ERROR = "error"  # another exit status
    TIMED_OUT = "timed_out"
    MEMORY = "memory"  # an uncaught MemoryError
    OUTPUT = "output"
    KILLED = "killed"  # by a signal
    REFUSED = "refused"  # not run, because no isolation is available


@dataclass(frozen=True)
class SandboxResult:
    """Output of a program, truncated at the limit, and its exit status; None if it did not exit by itself."""

    stdout: str
    stderr: str
    status: int | None
    reason: ExitReason


class SandboxFailed(RuntimeError):
    """The sandbox itself failed, not the program; the message says which operation."""


def run(
    source: str, stdin: str = "", limits: SandboxLimits | None = None, allow_unsafe: bool = False
) -> SandboxResult:
    """Run a Python program and wait for it to end. All processes it started are dead when this returns.

    If no isolation is available, the reason is REFUSED and stderr explains it in one line; with `allow_unsafe` the
    program is run as the current user with resource limits only. Raises SandboxFailed if isolation is available but the
    sandbox broke, which says nothing about the program.
    """
    isolation, _ = find_isolation()
    if isolation is None:
        if not allow_unsafe:
            return SandboxResult("", refusal() or "", None, ExitReason.REFUSED)
        with tempfile.TemporaryDirectory(prefix="manta-unsafe-") as home:
            return _run_in("process", source, stdin, limits or SandboxLimits(), home)
    return _run_in(isolation, source, stdin, limits or SandboxLimits(), "/tmp")


def refusal() -> str | None:
    """One line that explains why programs are not run, and what to do; None if isolation is available."""
    isolation, why = find_isolation()
    if isolation is not None:
        return None
    return (
        f"untrusted programs are not run here: no isolation is possible ({why}); install bubblewrap, allow user "
        "namespaces, or accept the risk with allow_unsafe=true"
    )


@cache
def find_isolation() -> tuple[Isolation | None, str]:
    """The isolation that works here, found by trying; if none does, None and the attempts."""
    # For root, bubblewrap would keep the user root, whose processes RLIMIT_NPROC does not count.
    bubblewrap = shutil.which("bwrap") is not None and os.geteuid() != 0
    ways: tuple[Isolation, ...] = ("bubblewrap", "namespaces") if bubblewrap else ("namespaces",)
    tried = []
    for way in ways:
        try:
            result = _run_in(way, _PROBE, "", SandboxLimits(), "/tmp")
        except (SandboxFailed, OSError, subprocess.SubprocessError) as error:
            tried.append(f"{way}: {str(error).splitlines()[0]}")
            continue
        if result.reason is ExitReason.OK:
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


def _run_in(isolation: Isolation, source: str, stdin: str, limits: SandboxLimits, home: str) -> SandboxResult:
    order = _sealed(json.dumps(_order(isolation, source, limits, home)))
    (reports, report_end), (lease, held) = _pipe(), _pipe()
    with order, reports, report_end, lease, held:
        handed = (order.fileno(), report_end.fileno(), lease.fileno())
        process = subprocess.Popen(
            [installation().executable, *FLAGS, sandbox_child.__file__, "supervise", *map(str, handed)],
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
                report_end.close()  # so that the pipe ends with its last writer in the sandbox
                outputs = _watch(process, stdin.encode(), reports.fileno(), limits)
            finally:
                _end(process, held)
    return _judge(*outputs, limits)


def _watch(
    process: subprocess.Popen[bytes], stdin: bytes, reports: int, limits: SandboxLimits
) -> tuple[bytes, bytes, str, ExitReason | None]:
    """Read until the program ends or exceeds a limit: stdout, stderr, reports, and the exceeded limit if any."""
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None
    into, out, err = process.stdin.fileno(), process.stdout.fileno(), process.stderr.fileno()
    read = {out: bytearray(), err: bytearray(), reports: bytearray()}
    given = memoryview(stdin)
    os.set_blocking(into, False)
    started, deadline = False, time.monotonic() + START_SECONDS
    cut: ExitReason | None = None
    with selectors.DefaultSelector() as selector:
        selector.register(into, selectors.EVENT_WRITE)
        for descriptor in read:
            selector.register(descriptor, selectors.EVENT_READ)
        while not read.keys().isdisjoint(selector.get_map()) and cut is None:
            left = deadline - time.monotonic()
            if left <= 0:
                cut = ExitReason.TIMED_OUT
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
                cut = ExitReason.OUTPUT
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
        raise SandboxFailed(f"a sandbox did not end within {END_SECONDS:g} s of being stopped") from None


def _judge(
    out: bytes, err: bytes, reports: str, cut: ExitReason | None, limits: SandboxLimits
) -> SandboxResult:
    stdout, stderr = out.decode(errors="replace"), err.decode(errors="replace")
    lines = dict(line.partition(" ")[::2] for line in reports.splitlines())
    if "failed" in lines:
        raise SandboxFailed(lines["failed"])
    if "started" not in lines:
        late = f"it was not ready within {START_SECONDS:g} s" if cut else "it ended before the program"
        raise SandboxFailed(f"{late}: {stderr.strip()[-500:]}")
    if cut is not None:
        return SandboxResult(stdout, stderr, None, cut)
    if "ended" not in lines:  # process 1 itself was killed
        return SandboxResult(stdout, stderr, None, ExitReason.KILLED)
    status, cpu_seconds = lines["ended"].split()
    code = os.waitstatus_to_exitcode(int(status))
    if code == 0:
        return SandboxResult(stdout, stderr, 0, ExitReason.OK)
    if code > 0:
        memory = stderr.strip().rpartition("\n")[2].startswith("MemoryError")
        return SandboxResult(stdout, stderr, code, ExitReason.MEMORY if memory else ExitReason.ERROR)
    slow = code == -signal.SIGXCPU or (code == -signal.SIGKILL and float(cpu_seconds) >= limits.cpu_seconds)
    return SandboxResult(stdout, stderr, None, ExitReason.TIMED_OUT if slow else ExitReason.KILLED)


def _order(isolation: Isolation, source: str, limits: SandboxLimits, home: str) -> dict[str, Any]:
    python = installation()
    # The sandbox's own processes count towards the limit if they run as the program's user.
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
            "RLIMIT_CORE": 1,  # disables core files and, unlike 0, pipes to a crash handler
            "RLIMIT_MEMLOCK": 0,
            "RLIMIT_SIGPENDING": MAX_SIGNALS,
        },
        "disk_bytes": limits.disk_bytes,
        "disk_files": MAX_FILES,
        "shown": python.shown,
        "covered": python.covered,
        "command": _bubblewrap(limits) if isolation == "bubblewrap" else [],
    }


def _bubblewrap(limits: SandboxLimits) -> list[str]:
    """The bubblewrap command line without the final descriptors; the child program is passed as text."""
    python = installation()
    command = [
        shutil.which("bwrap") or "bwrap",
        "--unshare-all",
        "--unshare-user",
        "--die-with-parent",
        "--as-pid-1",
    ]
    # CAP_SYS_ADMIN is for init, which limits the number of files in /tmp (bubblewrap has no option for it).
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
    """An immutable in-memory file (sealed memfd), positioned at its beginning."""
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
