"""What a process is doing right now, as text: the stack of every thread and of every asyncio task."""

from __future__ import annotations

import asyncio
import io
import sys
import threading
import traceback


def stacks() -> str:
    """Stacks of all threads, and of the tasks of the running event loop where there is one."""
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
