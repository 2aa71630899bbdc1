"""A Python interpreter as a tool: a program goes in, what it printed comes out.

Two functions, so that a configuration says which one it means: `python` needs isolation and refuses without it;
`python_unsafe` runs with limits alone where none is possible.
"""

from __future__ import annotations

from envs.sandbox import sandbox
from envs.sandbox.sandbox import Limits, Reason, Result

LIMITS = Limits(cpu_seconds=5, wall_seconds=30.0, output_bytes=4096)

_CUT = {
    Reason.TIMED_OUT: f"It was ended: it took longer than {LIMITS.cpu_seconds} s.",
    Reason.MEMORY: f"It was ended: it needed more than {LIMITS.memory_bytes >> 20} MiB.",
    Reason.OUTPUT: f"It was ended: it printed more than {LIMITS.output_bytes} characters.",
    Reason.KILLED: "It was ended by a signal.",
}


def python(source: str) -> str:
    """Run a Python program and return what it prints. It has the standard library and /tmp, and no network.

    Raises RuntimeError, one line, where no isolation is possible.
    """
    return _told(sandbox.run(source, limits=LIMITS))


def python_unsafe(source: str) -> str:
    """Run a Python program and return what it prints."""
    return _told(sandbox.run(source, limits=LIMITS, allow_unsafe=True))


def _told(result: Result) -> str:
    if result.reason is Reason.REFUSED:
        raise RuntimeError(result.stderr)
    if result.reason is Reason.OK:
        return result.stdout
    error = result.stderr.strip().rpartition("\n")[2] or f"It ended with exit status {result.status}."
    return result.stdout + _CUT.get(result.reason, error)
