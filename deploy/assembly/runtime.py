"""What the training driver asks of a ring, wherever its parts live: one process (local.py) or a Ray cluster."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from rollout.buffer.replay_store import EpisodeRow
from rollout.episodes.evaluation import EvaluationPlan
from rollout.wire.metrics import Row
from rollout.wire.trajectory import Task

T = TypeVar("T")

# Called with each version that a policy publishes; returns when all policies of the run have published it.
Met = Callable[[int], Awaitable[None]]


async def alone(version: int) -> None:
    """`Met` of a run's only policy."""


class LearnerLost(RuntimeError):
    """The learner died or froze. What it had learned since its last checkpoint is to be learned again."""


async def first_failure(wanted: asyncio.Future[T], others: Iterable[asyncio.Future[Any]]) -> T:
    """Wait for `wanted`, but not past the failure of anything it depends on: that failure is raised instead.

    Others that end well (a worker that has played all the run needs) are passed over.
    """
    watched = {other for other in others if not (other.done() and other.exception() is None)}
    try:
        while True:
            done, _ = await asyncio.wait({wanted, *watched}, return_when=asyncio.FIRST_COMPLETED)
            for other in done - {wanted}:
                other.result()
                watched.discard(other)
            if wanted in done:
                return wanted.result()
    finally:
        wanted.cancel()  # whoever no longer waits (a failure, Ctrl-C) does not leave it running


def loss_to_come() -> asyncio.Future[None]:
    """What fails when a part is lost. A run that is being stopped asks it no more, and nothing is said of that."""
    lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    lost.add_done_callback(lambda done: done.cancelled() or done.exception())
    return lost


async def waited_for(before_publish: Awaitable[object] | None) -> Row:
    """Wait for what needs the published version before the next one replaces it; a metric of how long."""
    if before_publish is None:
        return {}
    began = time.perf_counter()
    await before_publish
    return {"eval_wait_s": time.perf_counter() - began}


class Runtime(Protocol):
    """The parts of one run, started and joined. No method carries trajectories: they stay where they are made."""

    async def start(self, resume: bool) -> int:
        """Start every part; returns the weight version the learner stands at (0 on a new run)."""
        ...

    async def begin_stage(self, index: int) -> tuple[int, int]:
        """Have a stage's data gathered and handed to the learner; returns the steps it has made and how many there are.

        Steps are made already where the run goes on within the stage.
        """
        ...

    async def advance_stage(self, steps: int) -> list[Row]:
        """Make up to `steps` steps of the stage; fewer at its end."""
        ...

    async def publish(self, saves: bool = False) -> Row:
        """Bring the learner's version to every engine. saves: a checkpoint of it is asked for next."""
        ...

    async def evaluate(self, tasks: Sequence[Task], name: str, plan: EvaluationPlan) -> list[EpisodeRow]:
        """Play the samples of every task with the published weights; the rows are stored under `name`.

        Returns the samples of the first task, then those of the second.
        """
        ...

    def begin_rollouts(self) -> None:
        """Let the workers play groups until the replay buffer has given out all the run needs."""
        ...

    async def step(
        self, number: int, before_publish: Awaitable[object] | None = None, saves: bool = False
    ) -> Row:
        """Learner step `number`, published and released. Raises LearnerLost, and what stops the run.

        before_publish: what still needs the version before, such as an evaluation; its error is raised. saves: a
        checkpoint of the version is asked for next; without it the next step is, and the learner may begin it while
        engines load this one's weights.
        """
        ...

    async def recover(self, loss: LearnerLost) -> int:
        """Start the learner again from its newest checkpoint and bring everything else back to it.

        Returns the version it stands at; rollouts are to be begun again. Raises LearnerLost where it is lost meanwhile,
        and what stops the run where it was lost too often.
        """
        ...

    async def save(self) -> None:
        """Begin a checkpoint, once the one before has landed. Raises LearnerLost, and DiskFull for that one."""
        ...

    async def landed(self) -> None:
        """Wait until the last checkpoint is on disk. Raises LearnerLost and DiskFull."""
        ...

    async def counters(self) -> Row:
        """Sums over the workers since their start: tokens_sampled, turns, engine_seconds, env_seconds, ..."""
        ...

    async def counts(self) -> dict[str, int]:
        """The ledger: issued, in_flight, complete, taken, trained, dropped."""
        ...

    async def close(self) -> None:
        """Stop every part that was started."""
        ...

    @property
    def run_folder(self) -> Path: ...
