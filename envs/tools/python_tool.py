"""A Python interpreter as a tool: takes a program and returns what it prints.

Two functions, so that the configuration states the choice: `python` requires isolation and refuses to run without it;
`python_unsafe` falls back to resource limits only.
"""

from __future__ import annotations

from envs.sandbox import sandbox
from envs.sandbox.sandbox import ExitReason, SandboxLimits, SandboxResult

LIMITS = SandboxLimits(cpu_seconds=5, wall_seconds=30.0, output_bytes=4096)

_CUT = {
    ExitReason.TIMED_OUT: f"It was ended: it took longer than {LIMITS.cpu_seconds} s.",
    ExitReason.MEMORY: f"It was ended: it needed more than {LIMITS.memory_bytes >> 20} MiB.",
    ExitReason.OUTPUT: f"It was ended: it printed more than {LIMITS.output_bytes} characters.",
    ExitReason.KILLED: "It was ended by a signal.",
}


def python(source: str) -> str:
    """Run a Python program and return what it prints. It has the standard library and /tmp, and no network.

    Raises RuntimeError, one line, where no isolation is possible.
    """
    return _to_text(sandbox.run(source, limits=LIMITS))


def python_unsafe(source: str) -> str:
    """Run a Python program and return what it prints."""
    return _to_text(sandbox.run(source, limits=LIMITS, allow_unsafe=True))


def _to_text(result: SandboxResult) -> str:
    if result.reason is ExitReason.REFUSED:
        raise RuntimeError(result.stderr)
    if result.reason is ExitReason.OK:
        return result.stdout
    error = result.stderr.strip().rpartition("\n")[2] or f"It ended with exit status {result.status}."
    return result.stdout + _CUT.get(result.reason, error)
