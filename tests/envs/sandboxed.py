"""Programs run in a sandbox with small limits."""

from __future__ import annotations

import textwrap

from envs.sandbox import sandbox
from envs.sandbox.sandbox import ExitReason, SandboxLimits, SandboxResult

SMALL = SandboxLimits(
    cpu_seconds=20,
    wall_seconds=60,
    memory_bytes=128 << 20,
    processes=4,
    disk_bytes=1 << 20,
    output_bytes=1 << 16,
)


def attempt(source: str, stdin: str = "", allow_unsafe: bool = False, **limits: float) -> SandboxResult:
    return sandbox.run(textwrap.dedent(source), stdin, SMALL.model_copy(update=limits), allow_unsafe)


def answers(source: str, **limits: float) -> str:
    """What a program prints, which must end well."""
    result = attempt(source, **limits)
    assert result.reason is ExitReason.OK, result
    return result.stdout
