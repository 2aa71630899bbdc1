"""The process that an engine core on CPUs is forked from: it imports vLLM while the process that begins it does so too.

    our process  -- begin() ------------------------------------>  fork server: imports this module, and vLLM with it
                 -- vLLM starts its core ----------------------->  forks the core

Importing vLLM takes about ten seconds of CPU time; a spawned core begins with it only when our process is done with its
own. The fork server has one thread, so that forking it is safe. On GPUs cores are spawned.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from multiprocessing import forkserver

from envs.child_process import die_with_parent, import_path

_OWNER = "MANTA_FORK_SERVER_OF"  # in the fork server's environment only: the process that began it
_begun = False
pid = 0  # of the fork server, in it and in what it forks


def begin() -> bool:
    """Begin the fork server in the background, with this process's environment variables; True if it was begun.

    It is for the first engine of a process. A later one may need other variables: its core is spawned.
    """
    global _begun
    if _begun:
        return False
    _begun = True
    multiprocessing.set_forkserver_preload([__name__])
    with _environment({_OWNER: str(os.getpid()), "PYTHONPATH": import_path()}):
        forkserver.ensure_running()
    return True


class CurrentEnvironment(dict[str, str]):
    """Arrives in another process as the environment variables of the moment it was sent: vLLM sets some late."""

    def __reduce__(self) -> tuple[type, tuple[dict[str, str]]]:
        return dict, (dict(os.environ),)


@contextmanager
def _environment(more: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in more}
    os.environ.update(more)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


if owner := os.environ.pop(_OWNER, ""):
    pid = os.getpid()
    # The kernel ends the fork server with the thread that began it: multiprocessing's own would live as long as any
    # process that was forked from it.
    die_with_parent(int(owner))
    for module in (
        "rollout.engines.vllm_process",
        "rollout.engines.vllm_weights",
        "vllm.v1.worker.cpu_worker",
    ):
        import_module(module)
