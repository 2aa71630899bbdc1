"""Lifetime of vLLM's processes: they end with the process that started them, and their end is detected.

    our process  -- starts -->  engine core  -- starts -->  a worker for every GPU, or part of a layer on CPUs

An engine on CPUs that does not divide its layers computes within its core: a message between two processes for every
step would cost a quarter of what a small model's step costs.
With data parallelism there is a core for every copy; the end of one is the end of the engine.

On CPUs the first core of a process is forked from a fork server (vllm_fork_server.py), which stands between the two.

When our process ends in any way, the kernel kills the core, and with the core its workers, even if they are stopped or
hang. The shared memory of vLLM is unlinked as soon as the engine runs, so that nothing is left in /dev/shm after a
kill. Its sockets, in the folder for temporary files, keep their names, because the time of their connections is
unknown.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import threading
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm
from vllm.distributed.device_communicators.shm_broadcast import SpinCondition
from vllm.platforms import current_platform
from vllm.v1.engine import utils
from vllm.v1.engine.core import EngineCoreProc
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.executor.multiproc_executor import WorkerProc
from vllm.v1.executor.uniproc_executor import UniProcExecutor

from envs.child_process import die_with_parent
from rollout.engines import vllm_adapter_cpu, vllm_fork_server
from rollout.engines.engine import EngineDied
from rollout.engines.vllm_fork_server import CurrentEnvironment

T = TypeVar("T")
_POLL_INTERVAL_SECONDS = 0.0002
_END_TIMEOUT_SECONDS = 2  # from vLLM's report that its core is dead to the core's exit
_SLEEP_MS = 2
_run_engine_core, _run_worker = EngineCoreProc.run_engine_core, WorkerProc.worker_main


class CallFailed(RuntimeError):
    """vLLM's core runs, but a call failed; the message is vLLM's."""


@contextmanager
def ending_with_us(forked: bool) -> Iterator[None]:
    """Context in which started engines are bound to this process. forked: from the fork server, instead of spawned.

    The kernel watches the thread that starts them, which must outlive them: an event loop's thread, not a pool's.
    """
    # The core must not be forked from us: it would not share the resource tracker that `unlink_shared_memory` uses, and
    # would copy our threads' locks.
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
    EngineCoreProc.run_engine_core = partial(_engine_core, os.getpid(), CurrentEnvironment())
    get_mp_context = utils.get_mp_context
    if forked:
        utils.get_mp_context = partial(multiprocessing.get_context, "forkserver")
    try:
        yield
    finally:
        utils.get_mp_context = get_mp_context
        EngineCoreProc.run_engine_core = staticmethod(_run_engine_core)


def _engine_core(
    parent: int,
    environment: Mapping[str, str],
    *args: Any,
    vllm_config: Any,
    executor_class: type,
    **kwargs: Any,
) -> None:
    """The engine core's main function, in its own process."""
    die_with_parent(vllm_fork_server.pid or parent)
    # What differs only: the title of a process is written where its first variables lie.
    os.environ.update({name: value for name, value in environment.items() if os.environ.get(name) != value})
    _leave_nothing_named()
    forked = current_platform.is_cpu()
    if forked:
        _wait_asleep()
        vllm_adapter_cpu.multiply_by_adapter()
        if vllm_config.aux_output_config.enabled:
            from rollout.engines.vllm_routing_cpu import record_routing  # which imports what workers need

            record_routing()
        # The core has no threads yet when it starts its workers, so that forking is safe and saves the imports.
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"
        if vllm_config.parallel_config.world_size == 1:
            # vLLM refuses this on CPUs because it could not set OpenMP's variables, which stand in `environment` here.
            vllm_config.parallel_config.distributed_executor_backend = "uni"
            executor_class = UniProcExecutor
    WorkerProc.worker_main = partial(_worker, os.getpid(), forked)
    _run_engine_core(*args, vllm_config=vllm_config, executor_class=executor_class, **kwargs)


def _worker(parent: int, forked: bool, *args: Any, **kwargs: Any) -> None:
    """A worker's main function, in its own process."""
    die_with_parent(parent)
    if not forked:  # a forked worker inherits this from its core
        _leave_nothing_named()
    _run_worker(*args, **kwargs)


def _leave_nothing_named() -> None:
    tqdm.set_lock(threading.RLock())  # its default is a named semaphore
    # vLLM unlinks its memory at the end, when it is unlinked already.
    unlink = SharedMemory.unlink

    def tolerant(self: SharedMemory) -> None:
        with suppress(FileNotFoundError):
            unlink(self)

    SharedMemory.unlink = tolerant  # type: ignore[method-assign]


def _wait_asleep() -> None:
    """Let vLLM's processes sleep while they wait for one another, for engines on CPUs.

    They poll for a second after every message. With a GPU that costs nothing; on CPUs it takes cores from the learner,
    the environments and the engines themselves.
    """
    wait = SpinCondition.wait

    def asleep(self: SpinCondition, timeout_ms: int | None = None) -> None:
        self.busy_loop_s = min(self.busy_loop_s, _POLL_INTERVAL_SECONDS)
        # Short sleeps: a wake-up call is sometimes lost (observed: a sleep of ten seconds).
        wait(self, _SLEEP_MS if timeout_ms is None else min(timeout_ms, _SLEEP_MS))

    SpinCondition.wait = asleep


def unlink_shared_memory(cores: Sequence[int]) -> None:
    """Unlink the memory in /dev/shm that the cores and their workers have mapped; it is not opened again later."""
    for pid in (member for core in cores for member in family(core)):
        for line in Path(f"/proc/{pid}/maps").read_text(encoding="utf-8", errors="replace").splitlines():
            path = line[line.find("/") :]  # the last field, if any
            if path.startswith("/dev/shm/psm_") and os.path.exists(path):
                os.unlink(path)
                # otherwise the tracker reports a leak at exit
                resource_tracker.unregister(path.removeprefix("/dev/shm"), "shared_memory")


def family(pid: int) -> list[int]:
    """Process ids of a process and all of its current descendants."""
    children: list[int] = []
    with suppress(FileNotFoundError, ProcessLookupError):  # it may end meanwhile
        for thread in Path(f"/proc/{pid}/task").iterdir():
            children += map(int, (thread / "children").read_text(encoding="utf-8").split())
    return [pid, *(member for child in children for member in family(child))]


class CoreProcess:
    """The processes of an engine's cores; it must be created on the event loop that uses the engine."""

    def __init__(self, engine: str, first: BaseProcess, *others: BaseProcess) -> None:
        self._engine = engine
        self._processes = {process.pid: process for process in (first, *others) if process.pid is not None}
        self.pids = list(self._processes)
        self.pid = self.pids[0]
        self._loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[int] = self._loop.create_future()  # of the first that ends
        # Readable once the process has ended.
        self._descriptors = {pid: os.pidfd_open(pid) for pid in self.pids}
        for pid, descriptor in self._descriptors.items():
            self._loop.add_reader(descriptor, self._notice, pid)

    async def answer(self, call: Coroutine[Any, Any, T]) -> T:
        """Await a call of vLLM. Raises CallFailed, and EngineDied if the core ends, when vLLM would wait forever.

        A core that hangs is not detected: the caller sets a time limit.
        """
        calling = asyncio.ensure_future(call)
        try:
            both: set[asyncio.Future[Any]] = {calling, self._ended}
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            if not calling.done():
                raise await self.death()
            error = calling.exception()
            if error is None:
                return calling.result()
            if isinstance(error, EngineDeadError) or self._ended.done():
                raise await self.death() from error
            if type(error) is Exception:  # an error in vLLM's processes arrives as its text only
                raise CallFailed(f"{self._engine}: {str(error).strip().splitlines()[-1]}") from error
            raise error
        finally:
            calling.cancel()

    async def death(self) -> EngineDied:
        """Build the error that names the process and how it ended.

        The exit code may not be known yet: vLLM may report the end early, or be reaping the process in a thread. So
        this waits up to _END_TIMEOUT_SECONDS.
        """
        how, pid = "gave up (its log says why)", self.pid
        with suppress(TimeoutError):
            async with asyncio.timeout(_END_TIMEOUT_SECONDS):
                while not (ended := self._exited()):
                    await asyncio.sleep(_POLL_INTERVAL_SECONDS)
                pid, code = ended
                signalled = signal.Signals(-code).name if code < 0 else None
                how = f"was killed by {signalled}" if signalled else f"ended with exit code {code}"
        return EngineDied(f"{self._engine}: vLLM's engine core (pid {pid}) {how}")

    def _exited(self) -> tuple[int, int] | None:
        """The core that ended first, of those that have, and its exit code."""
        first = [self._ended.result()] if self._ended.done() else self.pids
        codes = ((pid, self._processes[pid].exitcode) for pid in first)
        return next(((pid, code) for pid, code in codes if code is not None), None)

    def close(self) -> None:
        """Stop watching."""
        for descriptor in self._descriptors.values():
            self._loop.remove_reader(descriptor)
            os.close(descriptor)
        self._descriptors.clear()

    def _notice(self, pid: int) -> None:
        self._loop.remove_reader(self._descriptors[pid])
        if not self._ended.done():
            self._ended.set_result(pid)
