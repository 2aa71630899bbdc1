"""Child processes: they end with the thread that starts them, however it ends, and import what is imported here."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import sys
from collections.abc import Sequence

_PR_SET_PDEATHSIG = 1
_SECRET = "RAY_AUTH_"
# It imports nothing that takes time. 1 and 9 are PR_SET_PDEATHSIG and SIGKILL.
_LAUNCHER = (
    "import ctypes, os, sys\n"
    "ctypes.CDLL(None).prctl(1, 9)\n"
    "if os.getppid() != int(sys.argv[1]): os._exit(1)\n"
    "try: os.execvp(sys.argv[2], sys.argv[2:])\n"
    "except OSError as error: sys.exit(f'{sys.argv[2]}: {error.strerror}')\n"
)


def end_with(parent: int) -> None:
    """Have the kernel kill this process when the thread of `parent` that started it is gone."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:  # it went before we could ask
        os.kill(os.getpid(), signal.SIGKILL)


def leashed(command: Sequence[str]) -> list[str]:
    """A command that becomes `command` and is killed when the thread that starts it is gone.

    A command that does not exist leaves with status 1 and says so.
    """
    program, *arguments = command
    resolved = found(program) or program
    return [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid()), resolved, *arguments]


def found(program: str) -> str | None:
    """Path of a program; None where there is none.

    "python" and "python3" are the interpreter that runs Manta, whose packages a user expects there: the one on PATH
    may be another.
    """
    return sys.executable if program in ("python", "python3") else shutil.which(program)


def inherited() -> dict[str, str]:
    """The environment variables that foreign code is started with: ours, without the token of our Ray."""
    return {name: value for name, value in os.environ.items() if not name.startswith(_SECRET)}


def import_path() -> str:
    """PYTHONPATH with which a new interpreter imports what this one does."""
    return os.pathsep.join(path or os.getcwd() for path in sys.path)
