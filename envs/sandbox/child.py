"""The processes inside the sandbox that start an untrusted program. Standard library only.

    supervise   outside; starts init, ends it on request or with its parent, and exits when no process is left
    init        process 1 of the sandbox; builds the file system, starts the program, reports how it ended
    program     drops all privileges, sets its limits, and executes the untrusted program

`envs.sandbox.sandbox` runs this file by path, or passes its text to a Python inside bubblewrap, with descriptors for
the order (JSON), the reports ("started", "ended STATUS CPU_SECONDS", "failed WHY", one per line) and the lease: the
caller holds its other end, and the sandbox ends when that is closed. The program inherits none of the three.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import select
import signal
import struct
import sys
from collections.abc import Callable
from typing import Any

NOBODY = 65534  # the program's user and group
CAPABILITIES = 64  # upper bound on capability numbers

_libc = ctypes.CDLL(None, use_errno=True)
_NEW_NAMESPACES = 0x10000000 | 0x00020000 | 0x20000000 | 0x40000000 | 0x08000000 | 0x04000000 | 0x02000000
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_REMOUNT = 1, 2, 4, 8, 32
_MS_BIND, _MS_REC, _MS_PRIVATE = 4096, 16384, 1 << 18
_MNT_DETACH = 2
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_CAPBSET_DROP = 1, 4, 22, 24
_PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS, _PR_SET_THP_DISABLE = 36, 38, 41
_SECCOMP_MODE_FILTER = 2

_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}  # the C library has no function for this system call

Order = dict[str, Any]


def supervise(order: Order, order_fd: int, reports: int, lease: int) -> None:
    """Start the sandbox, wait for its end or that of the lease, and kill all that is left."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)  # orphans are reparented to this process, which kills them
    children = os.open(f"/proc/self/task/{os.getpid()}/children", os.O_RDONLY)
    if order["isolation"] == "bubblewrap":
        child = _fork(lambda: _become_bubblewrap(order, order_fd, reports), reports)
    else:
        if order["isolation"] == "namespaces":
            _enter_namespaces(reports)
        parent = os.pidfd_open(os.getpid())
        child = _fork(lambda: init(order, reports, parent), reports)
    select.select([os.pidfd_open(child), lease], [], [])
    while True:
        for pid in os.pread(children, 1 << 16, 0).split():
            os.kill(int(pid), signal.SIGKILL)  # not reaped yet, so the pid cannot have been reused
        try:
            os.waitpid(-1, 0)  # for process 1, returns when its pid namespace is empty
        except ChildProcessError:
            return


def init(order: Order, reports: int, parent: int | None) -> None:
    """Start the program in its own file system and report its end; all other processes end with this one."""
    _prctl(_PR_SET_DUMPABLE, 0)  # the program may run as the same user and must not trace this process
    if parent is not None:
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if select.select([parent], [], [], 0)[0]:  # the parent ended before the prctl call
            os._exit(1)
    if order["isolation"] == "namespaces":
        _build_root(order)
    elif order["isolation"] == "bubblewrap":
        _mount("none", "/tmp", _MS_REMOUNT | _MS_NOSUID | _MS_NODEV, f"nr_inodes={order['disk_files']}")
    pid = _fork(lambda: program(order, reports), reports)
    ended = 0
    while ended != pid:
        ended, status, usage = os.wait4(-1, 0)
    os.write(reports, f"ended {status} {usage.ru_utime + usage.ru_stime:.3f}\n".encode())


def program(order: Order, reports: int) -> None:
    """Drop all privileges and execute the program."""
    os.setsid()
    for name, limit in order["limits"].items():
        which = getattr(resource, name)
        hard = resource.getrlimit(which)[1]
        soft, limit = (limit, limit + 1) if name == "RLIMIT_CPU" else (limit, limit)  # SIGXCPU, then SIGKILL
        if hard != resource.RLIM_INFINITY:
            soft, limit = min(soft, hard), min(limit, hard)
        resource.setrlimit(which, (soft, limit))
    if order["isolation"] != "process":
        _give_up_rights(bytes.fromhex(order["filter"]))
    os.chdir(order["home"])
    with open("main.py", "w", encoding="utf-8") as file:
        file.write(order["source"])
    os.write(reports, b"started\n")
    os.execve(order["python"][0], [*order["python"], "main.py"], order["environment"])


def _fork(work: Callable[[], None], reports: int) -> int:
    """Fork a process that calls `work`, reports an OSError, and exits."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except OSError as error:
            _report_failure(reports, error)
        os._exit(0)
    return pid


def _report_failure(reports: int, error: OSError) -> None:
    os.write(reports, f"failed {error}\n".encode())
    os._exit(1)


def _become_bubblewrap(order: Order, order_fd: int, reports: int) -> None:
    for descriptor in (order_fd, reports):
        os.set_inheritable(descriptor, True)
    command = [*order["command"], str(order_fd), str(reports)]
    os.execve(command[0], command, {})


def _enter_namespaces(reports: int) -> None:
    """Enter new user, mount, network, IPC, UTS, cgroup and (for children) pid namespaces.

    If started by root, the program runs as nobody outside as well as inside: RLIMIT_NPROC does not count processes of
    the host's root. That requires mapping two users, which only a process outside the namespace may do.
    """
    if os.geteuid() != 0:
        user, group = os.geteuid(), os.getegid()
        _call("unshare", _libc.unshare(_NEW_NAMESPACES))
        _write("/proc/self/setgroups", "deny")
        _write("/proc/self/uid_map", f"{NOBODY} {user} 1")
        _write("/proc/self/gid_map", f"{NOBODY} {group} 1")
        return
    entered, enter = os.pipe()
    inside = os.getpid()

    def map_users() -> None:
        os.close(enter)
        if os.read(entered, 1):
            for kind in ("uid_map", "gid_map"):
                _write(f"/proc/{inside}/{kind}", f"0 0 1\n{NOBODY} {NOBODY} 1")

    mapper = _fork(map_users, reports)
    _call("unshare", _libc.unshare(_NEW_NAMESPACES))
    os.write(enter, b".")
    if os.waitpid(mapper, 0)[1]:
        os._exit(1)  # the mapper has reported the error


def _build_root(order: Order) -> None:
    """Build an in-memory root: the files in `order`, read-only, and /tmp; the host's file system is detached."""
    _call("sethostname", _libc.sethostname(b"sandbox", 7))
    _mount("none", "/", _MS_REC | _MS_PRIVATE)
    _mount("tmpfs", "/tmp", _MS_NOSUID | _MS_NODEV, "mode=755,size=1m,nr_inodes=4096")
    os.chdir("/tmp")
    os.mkdir(".outside")
    call = _libc.syscall(_PIVOT_ROOT[os.uname().machine], b".", b".outside")
    _call("pivot_root", call)
    os.chdir("/")
    os.mkdir("/tmp")
    own = f"mode=700,uid={NOBODY},gid={NOBODY},size={order['disk_bytes']},nr_inodes={order['disk_files']}"
    _mount("tmpfs", "/tmp", _MS_NOSUID | _MS_NODEV, own)
    for source, target in order["shown"]:
        _show(f"/.outside{source}", target)
    for path in order["covered"]:
        _mount("tmpfs", path, _MS_NOSUID | _MS_NODEV | _MS_RDONLY, "size=4k,nr_inodes=2")
    _call("umount", _libc.umount2(b"/.outside", _MNT_DETACH))
    os.rmdir("/.outside")
    _mount("none", "/", _MS_REMOUNT | _MS_BIND | _MS_RDONLY | _MS_NOSUID | _MS_NODEV)


def _show(source: str, target: str) -> None:
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with open(target, "x", encoding="utf-8"):
            pass
    _mount(source, target, _MS_BIND | _MS_REC)
    # The kernel requires keeping the restrictions of the host's mount. statvfs and mount use the same flags.
    flags = os.statvfs(target).f_flag & (_MS_NODEV | _MS_NOEXEC)
    if not target.startswith("/dev/"):
        flags |= _MS_NODEV
    _mount("none", target, _MS_REMOUNT | _MS_BIND | _MS_RDONLY | _MS_NOSUID | flags)


def _give_up_rights(rules: bytes) -> None:
    for capability in range(CAPABILITIES):
        if _libc.prctl(_PR_CAPBSET_DROP, *map(ctypes.c_ulong, (capability, 0, 0, 0))):
            break  # beyond the last capability; or, in bubblewrap, dropping is not permitted
    if os.getuid() != NOBODY:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    header, none = struct.pack("=Ii", 0x20080522, 0), bytes(24)
    _call("capset", _libc.capset(header, none))
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    # A huge page stays allocated while one page of it is mapped, which no limit would count.
    _prctl(_PR_SET_THP_DISABLE, 1)
    array = ctypes.create_string_buffer(rules, len(rules))
    descriptor = struct.pack("@HP", len(rules) // 8, ctypes.addressof(array))
    pointer = ctypes.cast(ctypes.create_string_buffer(descriptor, len(descriptor)), ctypes.c_void_p)
    _call("seccomp", _libc.prctl(_PR_SET_SECCOMP, ctypes.c_ulong(_SECCOMP_MODE_FILTER), pointer))


def _mount(source: str, target: str, flags: int, options: str = "") -> None:
    kind = b"tmpfs" if source == "tmpfs" else b"none"
    done = _libc.mount(source.encode(), target.encode(), kind, ctypes.c_ulong(flags), options.encode())
    _call(f"mount {target}", done)


def _prctl(option: int, value: int) -> None:
    _call("prctl", _libc.prctl(option, *map(ctypes.c_ulong, (value, 0, 0, 0))))


def _call(what: str, result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def _write(path: str, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)


def main() -> None:
    role, *descriptors = sys.argv[1:]
    order_fd, reports, *lease = map(int, descriptors)
    for descriptor in (order_fd, reports, *lease):
        os.set_inheritable(descriptor, False)
    order = json.loads(os.pread(order_fd, os.fstat(order_fd).st_size, 0))
    try:
        if role == "supervise":
            supervise(order, order_fd, reports, *lease)
        else:
            init(order, reports, None)
    except OSError as error:
        _report_failure(reports, error)


if __name__ == "__main__":
    main()
