"""Child processes that are killed with the thread that started them, and that import the same modules."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import sys
from collections.abc import Sequence

_PR_SET_PDEATHSIG = 1
_SECRET = "RAY_AUTH_"
# Only fast imports. 1 and 9 are PR_SET_PDEATHSIG and SIGKILL.
_LAUNCHER = (
    "import ctypes, os, sys\n"
    "ctypes.CDLL(None).prctl(1, 9)\n"
    "if os.getppid() != int(sys.argv[1]): os._exit(1)\n"
    "try: os.execvp(sys.argv[2], sys.argv[2:])\n"
    "except OSError as error: sys.exit(f'{sys.argv[2]}: {error.strerror}')\n"
)


def die_with_parent(parent: int, by: signal.Signals = signal.SIGKILL) -> None:
    """Have the kernel send this process a signal when the thread of `parent` that started it ends."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, int(by), 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:  # the parent ended before the call
        os.kill(os.getpid(), signal.SIGKILL)


def bound_to_parent(command: Sequence[str]) -> list[str]:
    """A command line that executes `command` and is killed when the thread that starts it ends.

    If the program does not exist, it exits with status 1 and a message.
    """
    program, *arguments = command
    resolved = find_program(program) or program
    return [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid()), resolved, *arguments]


def find_program(program: str) -> str | None:
    """The path of a program, or None.

    "python" and "python3" are the interpreter that runs Manta, with its packages; the one on PATH may be another.
    """
    return sys.executable if program in ("python", "python3") else shutil.which(program)


def child_environment() -> dict[str, str]:
    """The environment variables for user code: those of this process, without Ray's token."""
    return {name: value for name, value in os.environ.items() if not name.startswith(_SECRET)}


def import_path() -> str:
    """The PYTHONPATH with which a new interpreter finds the modules that this one does."""
    return os.pathsep.join(path or os.getcwd() for path in sys.path)
