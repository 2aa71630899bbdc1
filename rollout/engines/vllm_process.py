"""vLLM's processes as the one that started them sees them: they end when it does, and their end is noticed.

    our process  -- starts -->  engine core  -- starts -->  a worker for every GPU (one on CPU)

However our process ends, the kernel kills the core, and with the core its workers: no signal of ours is needed, and a
core that is stopped or hangs is killed all the same. The memory that vLLM shares between them loses its names as soon
as the engine runs, so that nothing is left in /dev/shm whoever is killed when. Its sockets lie in the folder for
temporary files, and keep their names: they connect when they get round to it, which nobody is told.
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Coroutine, Iterator
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
from vllm.v1.engine.core import EngineCoreProc
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.executor.multiproc_executor import WorkerProc

from envs.child_process import end_with
from rollout.engines.engine import EngineDied

T = TypeVar("T")
_POLL_SECONDS = 0.0002  # for what is all but there
_END_SECONDS = 2  # from vLLM's word that its core is dead to the core's end
_NAP_MS = 2
_run_engine_core, _run_worker = EngineCoreProc.run_engine_core, WorkerProc.worker_main


class CallFailed(RuntimeError):
    """vLLM's core is well but could not do what it was asked; the message is its own."""


@contextmanager
def ending_with_us() -> Iterator[None]:
    """Engines started inside end with this process.

    The kernel watches the thread that starts them, which must last as long as they do: an event loop's, not a pool's.
    """
    # The core must be a new process: a forked one would not share the resource tracker that `take_names_away` asks, and
    # would be a copy of whatever threads we have.
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
    EngineCoreProc.run_engine_core = partial(_engine_core, os.getpid())
    try:
        yield
    finally:
        EngineCoreProc.run_engine_core = staticmethod(_run_engine_core)


def _engine_core(parent: int, *args: Any, **kwargs: Any) -> None:
    """The engine core's main function, in its own process."""
    end_with(parent)
    _leave_nothing_named()
    forked = current_platform.is_cpu()
    if forked:
        _wait_asleep()
        # The core has no threads yet when it starts its worker: a copy of it need not import everything once more.
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"
    WorkerProc.worker_main = partial(_worker, os.getpid(), forked)
    _run_engine_core(*args, **kwargs)


def _worker(parent: int, forked: bool, *args: Any, **kwargs: Any) -> None:
    """A worker's main function, in its own process."""
    end_with(parent)
    if not forked:  # a copy has all that its core has done
        _leave_nothing_named()
    _run_worker(*args, **kwargs)


def _leave_nothing_named() -> None:
    tqdm.set_lock(threading.RLock())  # its own is a semaphore with a name
    # vLLM takes its memory's names away itself at the end: ours are gone by then, and nothing is wrong.
    unlink = SharedMemory.unlink

    def tolerant(self: SharedMemory) -> None:
        with suppress(FileNotFoundError):
            unlink(self)

    SharedMemory.unlink = tolerant  # type: ignore[method-assign]


def _wait_asleep() -> None:
    """Have vLLM's processes wait for one another asleep: for engines on CPUs.

    They poll for a second after every message, which costs nothing where a GPU computes and the cores are idle. Where
    the cores are what computes, it takes them from everything else: the learner, the environments, each other.
    """
    wait = SpinCondition.wait

    def asleep(self: SpinCondition, timeout_ms: int | None = None) -> None:
        self.busy_loop_s = min(self.busy_loop_s, _POLL_SECONDS)
        # Short naps: now and then the call that is to wake it does not come (seen: it slept for ten seconds).
        wait(self, _NAP_MS if timeout_ms is None else min(timeout_ms, _NAP_MS))

    SpinCondition.wait = asleep


def take_names_away(core: int) -> None:
    """Unlink what the core and its workers share in /dev/shm: they have mapped it, and nobody opens it later.

    Only what these processes have mapped is touched.
    """
    for pid in family(core):
        for line in Path(f"/proc/{pid}/maps").read_text(encoding="utf-8", errors="replace").splitlines():
            path = line[line.find("/") :]  # the last field, where there is one
            if path.startswith("/dev/shm/psm_") and os.path.exists(path):
                os.unlink(path)
                # or the tracker complains of a leak in the end
                resource_tracker.unregister(path.removeprefix("/dev/shm"), "shared_memory")


def family(pid: int) -> list[int]:
    """A process and everything it has started, that has started, ... as of now."""
    children: list[int] = []
    with suppress(FileNotFoundError, ProcessLookupError):  # one that ends meanwhile has no more children
        for thread in Path(f"/proc/{pid}/task").iterdir():
            children += map(int, (thread / "children").read_text(encoding="utf-8").split())
    return [pid, *(member for child in children for member in family(child))]


class CoreProcess:
    """The engine core's process; made on the event loop that uses the engine."""

    def __init__(self, engine: str, process: BaseProcess) -> None:
        assert process.pid is not None
        self.pid = process.pid
        self._engine = engine
        self._process = process
        self._loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[None] = self._loop.create_future()
        self._descriptor = os.pidfd_open(self.pid)  # readable once the process has ended
        self._loop.add_reader(self._descriptor, self._notice)

    async def answer(self, call: Coroutine[Any, Any, T]) -> T:
        """What vLLM answers. EngineDied when the core ends first: vLLM would wait for ever. CallFailed as it says.

        A core that hangs is not noticed here: the limit is the caller's.
        """
        asking = asyncio.ensure_future(call)
        try:
            both: set[asyncio.Future[Any]] = {asking, self._ended}
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            if not asking.done():
                raise await self.death()
            error = asking.exception()
            if error is None:
                return asking.result()
            if isinstance(error, EngineDeadError) or self._ended.done():
                raise await self.death() from error
            if type(error) is Exception:  # all that is left of an error in vLLM's processes: its text
                raise CallFailed(f"{self._engine}: {str(error).strip().splitlines()[-1]}") from error
            raise error
        finally:
            asking.cancel()

    async def death(self) -> EngineDied:
        """The error that says which process is gone, and how it ended where it has.

        Whoever says first that the core is dead may be ahead of its end, and a thread of vLLM's that is just reaping
        it makes the exit code unknown for an instant: so there is a moment's wait.
        """
        how = "gave up (its log says why)"
        with suppress(TimeoutError):
            async with asyncio.timeout(_END_SECONDS):
                while (code := self._process.exitcode) is None:
                    await asyncio.sleep(_POLL_SECONDS)
                signalled = signal.Signals(-code).name if code < 0 else None
                how = f"was killed by {signalled}" if signalled else f"ended with exit code {code}"
        return EngineDied(f"{self._engine}: vLLM's engine core (pid {self.pid}) {how}")

    def close(self) -> None:
        """Stop watching."""
        if self._descriptor >= 0:
            self._loop.remove_reader(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = -1

    def _notice(self) -> None:
        self._loop.remove_reader(self._descriptor)
        self._ended.set_result(None)
