"""Attempts to reach out of the sandbox: to files, sockets, processes, privileges."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from envs.sandbox import sandbox
from envs.sandbox.python_files import installation
from tests.envs.sandboxed import answers

ROOT = Path(__file__).resolve().parents[3]

pytestmark = pytest.mark.skipif(sandbox.refusal() is not None, reason=str(sandbox.refusal()))


def test_every_file_to_be_seen_is_pythons(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("for nobody's eyes", encoding="utf-8")
    secret.chmod(0o644)
    paths = [
        "/etc/passwd",
        "/proc/1/environ",
        "/proc/self/environ",
        "/sys/kernel",
        "/dev/shm",
        str(ROOT),
        str(secret),
    ]
    seen = answers(
        f"""
        import os
        print([path for path in {paths} if os.path.lexists(path)])
        for folder, _, files in os.walk("/"):
            for name in files:
                print(os.path.join(folder, name))
        """,
        output_bytes=1 << 22,
    ).splitlines()
    shown = {target for _, target in installation().shown}
    assert seen[0] == "[]" and installation().executable in seen
    strangers = [
        path for path in seen[1:] if path not in shown and not any(map(path.startswith, folders(shown)))
    ]
    assert strangers == ["/tmp/main.py"]
    assert not [path for path in seen if "-packages/" in path]


def folders(shown: set[str]) -> list[str]:
    return [f"{path}/" for path in shown if os.path.isdir(path)]


def test_the_hosts_sockets_cannot_be_reached(tmp_path: Path) -> None:
    abstract = f"\0{uuid.uuid4()}"
    with socket.create_server(("127.0.0.1", 0)) as loopback, socket.socket(socket.AF_UNIX) as unix:
        unix.bind(abstract)
        unix.listen()
        unix.setblocking(False)
        loopback.setblocking(False)
        said = answers(
            f"""
            import socket
            for family, address in ((socket.AF_INET, {loopback.getsockname()}), (socket.AF_UNIX, {abstract!r})):
                try:
                    socket.socket(family).connect(address)
                    print("connected")
                except OSError:
                    print("refused")
            for family in (socket.AF_VSOCK, socket.AF_NETLINK, socket.AF_PACKET, socket.AF_ALG):
                try:
                    socket.socket(family, socket.SOCK_STREAM)
                    print("made", family)
                except OSError:
                    print("refused")
            """
        )
        assert said.split() == ["refused"] * 6
        for listener in (loopback, unix):
            with pytest.raises(BlockingIOError):
                listener.accept()


def test_nothing_outside_is_written(tmp_path: Path) -> None:
    library = os.__file__
    target = tmp_path / "written"
    paths = [
        "/x",
        "/dev/x",
        "/etc/x",
        str(target),
        library,
        installation().executable,
        os.path.dirname(library) + "/x",
    ]
    assert answers(
        f"""
        import os
        def works(action, *arguments):
            try:
                action(*arguments)
                return True
            except OSError:
                return False
        print([path for path in {paths} if works(open, path, "a")])
        print(works(os.remove, {library!r}), works(os.chmod, {library!r}, 0o777), works(os.mkdir, "/new"))
        print(works(os.mknod, "/tmp/null", 0o20666, os.makedev(1, 3)))
        """
    ).splitlines() == ["[]", "False False False", "False"]
    assert not target.exists()


def test_no_variable_and_no_open_file_is_handed_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MANTA_SECRET", "for nobody's eyes")
    handed = os.open("/etc/passwd", os.O_RDONLY)
    os.set_inheritable(handed, True)
    said = answers(
        """
        import ctypes, os
        print(dict(os.environ), ctypes.CDLL(None).getenv(b"MANTA_SECRET"))
        def is_open(descriptor):
            try:
                return bool(os.fstat(descriptor))
            except OSError:
                return False
        print([descriptor for descriptor in range(1024) if is_open(descriptor)])
        """
    )
    os.close(handed)
    assert said == "{'PYTHONHASHSEED': '0'} 0\n[0, 1, 2]\n"


def test_processes_of_the_host_cannot_be_signalled() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as victim:
        said = answers(
            f"""
            import os, signal
            def reached(pid):
                try:
                    os.kill(pid, signal.SIGKILL)
                    return True
                except OSError:
                    return False
            print(reached({victim.pid}), reached({os.getpid()}), reached({os.getppid()}))
            reached(-1), reached(1)
            print("alive")
            """
        )
        assert said.split() == ["False", "False", "False", "alive"]
        assert victim.poll() is None
        victim.kill()


def test_no_right_is_left_and_none_is_had_again() -> None:
    said = answers(
        """
        import ctypes, os, resource, struct
        libc = ctypes.CDLL(None, use_errno=True)
        header, data = struct.pack("=Ii", 0x20080522, 0), ctypes.create_string_buffer(24)
        libc.capget(header, data)
        print(any(data.raw), os.getresuid(), os.getresgid())
        for action in (
            lambda: os.setuid(0),
            lambda: os.chroot("/tmp"),
            lambda: resource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40)),
            lambda: resource.setrlimit(resource.RLIMIT_NPROC, (1 << 20, 1 << 20)),
        ):
            try:
                action()
                print("had")
            except (OSError, ValueError):
                print("refused")
        print(libc.ptrace(16, 1, None, None), libc.setns(0, 0), libc.syscall(435, 0, 0), libc.syscall(1000))
        """
    )
    nobody = "(65534, 65534, 65534)"
    assert said.splitlines() == [f"False {nobody} {nobody}", *["refused"] * 4, "-1 -1 -1 -1"]
