"""How programs end in the sandbox: by themselves or at a limit, without leaving processes behind."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from envs.sandbox import sandbox
from envs.sandbox.python_files import Installation, installation
from envs.sandbox.sandbox import ExitReason, SandboxFailed, SandboxResult
from tests.envs.sandboxed import SMALL, answers, attempt

ROOT = Path(__file__).resolve().parents[3]

pytestmark = pytest.mark.skipif(sandbox.refusal() is not None, reason=str(sandbox.refusal()))


def name() -> str:
    """A name for a process that no other has; what it forks has it too."""
    return uuid.uuid4().hex[:15]


def naming(token: str) -> str:
    return f"import ctypes, os, time; ctypes.CDLL(None).prctl(15, b'{token}', 0, 0, 0)\n"


def named(token: str) -> list[int]:
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            if Path(f"/proc/{pid}/comm").read_text(encoding="utf-8").strip() == token:
                found.append(int(pid))
        except OSError:  # it has just ended
            continue
    return found


@pytest.fixture
def token() -> str:
    """A process's name, after a look whether processes are found by it."""
    control = name()
    with subprocess.Popen(
        [sys.executable, "-c", naming(control) + "print(flush=True); input()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert named(control) == [process.pid]
        process.kill()
    return name()


def test_an_honest_program_gets_its_input_and_gives_its_output() -> None:
    result = attempt(
        "import sys; print(sum(map(int, sys.stdin))); print('aside', file=sys.stderr)", "1\n2\n39\n"
    )
    assert result == SandboxResult("42\n", "aside\n", 0, ExitReason.OK)


def test_the_standard_library_is_there_and_nothing_is_installed() -> None:
    assert answers(
        """
        import asyncio, bz2, ctypes, decimal, hashlib, json, lzma, random, re, sqlite3, ssl, tempfile, threading, zlib
        import subprocess, sys, importlib.util
        threading.Thread(target=print, args=(1,)).start()
        with tempfile.TemporaryFile() as file:
            print(file.write(b"abc"))
        print(subprocess.run([sys.executable, "-c", "print('child')"], capture_output=True, text=True).stdout.strip())
        print(asyncio.run(asyncio.sleep(0, "slept")))
        print([name for name in ("numpy", "gymnasium", "envs", "pip") if importlib.util.find_spec(name)])
        """
    ).split("\n") == ["1", "3", "child", "slept", "[]", ""]


@pytest.mark.parametrize(
    ("source", "status", "reason", "last"),
    [
        ("raise SystemExit(7)", 7, ExitReason.ERROR, ""),
        ("print(1 / 0)", 1, ExitReason.ERROR, "ZeroDivisionError: division by zero"),
        ("print(", 1, ExitReason.ERROR, "SyntaxError: '(' was never closed"),
        ("import os; os.kill(os.getpid(), 9)", None, ExitReason.KILLED, ""),
        ("import os; os.abort()", None, ExitReason.KILLED, ""),
    ],
)
def test_how_a_program_ended_is_told(source: str, status: int | None, reason: ExitReason, last: str) -> None:
    result = attempt(source)
    assert (result.status, result.reason) == (status, reason)
    assert result.stderr.strip().rpartition("\n")[2] == last


def test_sets_have_one_order() -> None:
    assert len({answers("print({'a', 'b', 'c', 'd', 'e'})") for _ in range(3)}) == 1


def test_an_infinite_loop_is_ended_by_its_processor_time() -> None:
    assert attempt("while True: pass", cpu_seconds=1).reason is ExitReason.TIMED_OUT


def test_what_ignores_every_signal_is_ended_by_the_clock() -> None:
    source = """
        import signal, time
        for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
            signal.signal(number, signal.SIG_IGN)
        print("deaf", flush=True)
        time.sleep(1000)
        """
    assert attempt(source, wall_seconds=1.0) == SandboxResult("deaf\n", "", None, ExitReason.TIMED_OUT)


def test_a_fork_bomb_has_as_many_processes_as_allowed_and_leaves_none(token: str) -> None:
    bomb = naming(token) + "while True:\n    try: os.fork()\n    except OSError: pass"
    assert attempt(bomb, wall_seconds=0.5).reason is ExitReason.TIMED_OUT
    assert named(token) == []
    counted = """
        import os, time
        count = 1
        try:
            while os.fork():
                count += 1
            time.sleep(1000)
        except BlockingIOError:
            print(count)
        """
    assert int(answers(counted, processes=3)) == 3


def test_a_memory_bomb_hits_the_limit() -> None:
    assert attempt("held = []\nwhile True: held.append(bytearray(1 << 20))").reason is ExitReason.MEMORY
    assert attempt("bytearray(1 << 40)").reason is ExitReason.MEMORY


@pytest.mark.parametrize("stream", [1, 2])
def test_a_gigabyte_of_output_is_cut_at_the_limit(stream: int) -> None:
    result = attempt(
        f"import os\nfor _ in range(1 << 14): os.write({stream}, b'x' * (1 << 16))", output_bytes=5000
    )
    assert (result.reason, result.status) == (ExitReason.OUTPUT, None)
    assert (result.stdout, result.stderr)[stream - 1] == "x" * 5000


def test_no_process_is_left_behind(token: str) -> None:
    daemon = """
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.write(1, b'hidden ')
        time.sleep(1000)
    os._exit(0)
os.wait()
time.sleep(0.1)
print('done')
"""
    assert answers(naming(token) + daemon).split()[-1] == "done"
    assert named(token) == []


def test_all_is_dead_when_whoever_ran_it_is_killed(token: str) -> None:
    script = f"from envs.sandbox import sandbox; sandbox.run({naming(token) + 'time.sleep(1000)'!r})"
    with subprocess.Popen([sys.executable, "-c", script], cwd=ROOT) as runner:
        deadline = time.monotonic() + 60
        while not (found := named(token)):
            assert runner.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        watched = [os.pidfd_open(pid) for pid in found]
        runner.kill()
    for descriptor in watched:
        assert select.select([descriptor], [], [], 30)[0], "it outlived its runner"
        os.close(descriptor)


def test_the_disk_and_the_largest_file_have_limits() -> None:
    fill = """
        import os
        written = 0
        for index in range(8):
            try:
                with open(f"/tmp/{index}", "wb", buffering=0) as file:
                    while True:
                        written += file.write(bytes(4096))
            except OSError as error:
                pass
        print(written)
        """
    assert 0.9 * SMALL.disk_bytes <= int(answers(fill)) <= SMALL.disk_bytes


def test_where_no_isolation_is_possible_nothing_is_run(monkeypatch: pytest.MonkeyPatch, token: str) -> None:
    monkeypatch.setattr(sandbox, "find_isolation", lambda: (None, "namespaces: Operation not permitted"))
    result = attempt("print('it ran')")
    assert (result.stdout, result.status, result.reason) == ("", None, ExitReason.REFUSED)
    assert "allow_unsafe=true" in result.stderr and "\n" not in result.stderr
    assert attempt("print('it ran')", allow_unsafe=True) == SandboxResult("it ran\n", "", 0, ExitReason.OK)


def test_without_isolation_limits_and_the_end_of_all_still_hold(
    monkeypatch: pytest.MonkeyPatch, token: str
) -> None:
    monkeypatch.setattr(sandbox, "find_isolation", lambda: (None, "nothing"))
    monkeypatch.setenv("MANTA_SECRET", "for nobody's eyes")
    unsafe = {"allow_unsafe": True}
    assert attempt("import os; print('MANTA_SECRET' in os.environ)", **unsafe).stdout == "False\n"
    assert attempt("bytearray(1 << 40)", **unsafe).reason is ExitReason.MEMORY
    assert attempt("import time; time.sleep(1000)", wall_seconds=0.5, **unsafe).reason is ExitReason.TIMED_OUT
    if os.geteuid() == 0:  # another user's processes are all counted, so that it may not fork at all
        daemon = (
            naming(token) + "if os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0: time.sleep(1000)"
        )
        assert attempt(daemon, **unsafe).reason is ExitReason.OK
        assert named(token) == []


def test_a_sandbox_that_breaks_is_no_result_of_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    real = installation()
    broken = Installation(real.executable, (*real.shown, ("/no/such/file", "/file")), real.covered)
    monkeypatch.setattr(sandbox, "installation", lambda: broken)
    with pytest.raises(SandboxFailed, match="/file"):
        attempt("print(1)")
