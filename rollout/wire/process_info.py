"""A process of a run: where it runs, for a person who inspects or ends it, and the stacks of its threads and tasks."""

from __future__ import annotations

import asyncio
import io
import os
import socket
import sys
import threading
import traceback
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ProcessInfo:
    """Address of one process."""

    host: str
    pid: int
    node: str  # the cluster's id of the machine; empty without a cluster
    log: str  # where its standard error goes: a file, or the terminal or pipe as the system names it

    def __str__(self) -> str:
        return f"pid {self.pid} on {self.host}, log {self.log}"


def here(node: str = "") -> ProcessInfo:
    """Return the address of this process."""
    return ProcessInfo(socket.gethostname(), os.getpid(), node, os.readlink("/proc/self/fd/2"))


def stacks() -> str:
    """Return the stacks of all threads and, where an event loop runs in this one, of its tasks, as text."""
    text = io.StringIO()
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    for ident, frame in sys._current_frames().items():
        text.write(f"thread {names.get(ident, '?')} ({ident})\n")
        traceback.print_stack(frame, file=text)
    try:
        tasks = asyncio.all_tasks()
    except RuntimeError:
        return text.getvalue()  # no event loop runs in this thread
    for task in sorted(tasks, key=asyncio.Task.get_name):
        text.write(f"task {task.get_name()}\n")
        task.print_stack(file=text)
    return text.getvalue()
