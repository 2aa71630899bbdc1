"""Several learner processes on this machine: every rank calls the same function, and says what it gave."""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from learner.data import prefix_tree
from learner.parallel.ranks import ALONE, Ranks, Rendezvous

SECONDS = 150.0
Work = Callable[..., Any]


def together(
    size: int,
    work: Work,
    *args: Any,
    seconds: float = SECONDS,
    over: int | None = None,
    context: int = 1,
) -> list[Any]:
    """What `work(ranks, *args)` gives on each rank, in order; the first failure is raised with its traceback.

    seconds: limit of any wait; over: ranks that parameters are sharded over, None: all; context: those that share rows.
    """
    start = multiprocessing.get_context("forkserver")  # which has imported everything once
    start.set_forkserver_preload(["learner.training.learner", "rollout.wire.schema"])
    rendezvous = Rendezvous("127.0.0.1", size, seconds)
    pipes = [start.Pipe(duplex=False) for _ in range(size)]
    processes = [
        start.Process(
            target=_rank,
            args=(rank, size, rendezvous.address, said, work, args, seconds, over, context),
            daemon=True,
        )
        for rank, (_, said) in enumerate(pipes)
    ]
    try:
        for process, (_, said) in zip(processes, pipes, strict=True):
            process.start()
            said.close()
        return _answers([heard for heard, _ in pipes], seconds)
    finally:
        for process in processes:
            process.kill()
            process.join(SECONDS)


def in_turn(ranks: Ranks, work: Work, cases: Sequence[tuple[Any, ...]]) -> list[Any]:
    """What `work(ranks, *case)` gives for each case in one process, whose start takes longer than most cases."""
    found = []
    for case in cases:
        torch.manual_seed(0)  # as a new process begins
        found.append(work(ranks, *case))
    return found


def _answers(pipes: list[Connection], seconds: float) -> list[Any]:
    found: dict[Connection, Any] = {}
    while len(found) < len(pipes):
        ready = wait([pipe for pipe in pipes if pipe not in found], seconds)
        assert ready, f"{len(pipes) - len(found)} of {len(pipes)} ranks said nothing for {seconds:g} s"
        for pipe in ready:
            assert isinstance(pipe, Connection)
            good, found[pipe] = pipe.recv()
            assert good, found[pipe]
    return [found[pipe] for pipe in pipes]


def _rank(
    rank: int,
    size: int,
    address: str,
    said: Connection,
    work: Work,
    args: tuple[Any, ...],
    seconds: float,
    over: int | None,
    context: int,
) -> None:
    torch.set_num_threads(1)
    prefix_tree.LEAST_SHARED = 1  # as in the tests' own process: siblings have few tokens in common
    try:
        ranks = ALONE if size == 1 else Ranks.join(rank, size, address, "cpu", seconds, over, context)
        answer = True, work(ranks, *args)
    except BaseException:  # whatever it is, it is told
        answer = False, traceback.format_exc()
    said.send(answer)
