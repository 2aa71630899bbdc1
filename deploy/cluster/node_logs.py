"""Logs of all nodes of a cluster in the run folder, while the run goes on.

RUN/logs/HOST-NODE/worker-*.{out,err}    standard output and error of every process of this job on that node

Ray keeps the logs of a node's processes on that node, and they go with it. On each node an actor without resources
appends what is new to a copy; the run folder is shared by all nodes. What a node wrote in the last seconds before it
was lost is lost with it.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

LOGS = "logs"
COPY_SECONDS = 15.0  # from one copy to the next
_LIMIT_SECONDS = 30.0  # for one copy of all nodes
_MOST_BYTES = 64 << 20  # of one file at once: a copy never holds the run up


class LogCopy:
    """Appends what is new in the files of a folder to files of the same names in another one."""

    def __init__(self, source: Path, pattern: str, target: Path) -> None:
        self._source, self._pattern, self._target = source, pattern, target
        self._copied: dict[str, int] = {}

    def copy(self) -> int:
        """Copy what was written since the last call; returns the bytes. A full disk loses them, not the run."""
        total = 0
        for file in sorted(self._source.glob(self._pattern)):
            done = self._copied.get(file.name, 0)
            try:
                with file.open("rb") as log:
                    log.seek(done)
                    new = log.read(_MOST_BYTES)
                if new:
                    self._target.mkdir(parents=True, exist_ok=True)
                    with (self._target / file.name).open("ab") as kept:
                        kept.write(new)
            except OSError:
                continue
            self._copied[file.name] = done + len(new)
            total += len(new)
        return total


class NodeLogs(LogCopy):
    """The logs of the node that it is made on, of the processes of one job. folder: the run's."""

    def __init__(self, folder: Path, job: str) -> None:
        context = ray.get_runtime_context()
        # Ray has no other way to ask for it.
        source = Path(ray._private.worker._global_node.get_logs_dir_path())
        target = folder / LOGS / f"{socket.gethostname()}-{context.get_node_id()[:8]}"
        super().__init__(source, f"worker-*-{job}-*.[eo][ru][rt]", target)


@contextlib.contextmanager
def logs_kept_in(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Copy the logs of all nodes of this driver's job into RUN/logs while the context is open, and at its end."""
    ended = threading.Event()
    copies = _Copies(folder.resolve(), say)

    def keep() -> None:
        while not ended.wait(COPY_SECONDS):
            copies.copy()

    thread = threading.Thread(target=keep, name="node logs", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(2 * _LIMIT_SECONDS)
        if not thread.is_alive() and ray.is_initialized():
            copies.copy()


class _Copies:
    """An actor for each node."""

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        self._folder, self._say = folder, say
        self._actors: dict[str, Any] = {}
        self._job = ray.get_runtime_context().get_job_id()
        self._told = False

    def copy(self) -> None:
        """Have every node copy; a node that is lost, or does not answer in time, is asked again the next time."""
        alive = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
        asked = {node: self._of(node).copy.remote() for node in alive}
        for node, answer in asked.items():
            try:
                ray.get(answer, timeout=_LIMIT_SECONDS)
            except (RayError, GetTimeoutError) as error:
                self._actors.pop(node, None)
                if not self._told:
                    self._told = True
                    self._say(f"note: logs of node {node[:8]} were not copied: {type(error).__name__}")

    def _of(self, node: str) -> Any:
        if node not in self._actors:
            here = NodeAffinitySchedulingStrategy(node, soft=False)
            made = ray.remote(NodeLogs).options(num_cpus=0, scheduling_strategy=here)
            self._actors[node] = made.remote(self._folder, self._job)
        return self._actors[node]
