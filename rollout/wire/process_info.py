"""Where a part of a run lives: what a person needs to look at it, or to end it."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ProcessInfo:
    """One process."""

    host: str
    pid: int
    node: str  # the hosting cluster's id of the machine; empty without a cluster
    log: str  # where its standard error goes: a file, or the terminal or pipe as the system names it

    def __str__(self) -> str:
        return f"pid {self.pid} on {self.host}, log {self.log}"


def here(node: str = "") -> ProcessInfo:
    """Those of this very process."""
    return ProcessInfo(socket.gethostname(), os.getpid(), node, os.readlink("/proc/self/fd/2"))
