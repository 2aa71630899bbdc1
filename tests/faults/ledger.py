"""The node of the ledger lost, again and again, on two nodes of 8 pretended GPUs: it is recovered from its copy.

The replay buffer is placed on one of the two by a resource of theirs, and its state on that node's disk, which is
removed with the node. What the copy in the run folder has is all that the next replay buffer can know.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from tests.faults.matrix import GROUPS_PER_STEP, KILL, OVERRIDES, Raylets, finish
from tests.faults.run import Accounts, Driver, accounts, until

LIMIT_SECONDS = 400.0  # for each wait: of a start, too, on a machine with other work
GPUS = 8
GPUS_PER_WORKER = 4


@dataclass(frozen=True)
class Result:
    """How often the ledger's node was lost, how long each recovery took, and the books at the end."""

    losses: int
    seconds: list[float]
    accounts: Accounts
    status: int

    @property
    def sound(self) -> bool:
        return not self.status and self.accounts.sound and len(self.seconds) == self.losses

    def __str__(self) -> str:
        worst, middle = (f(self.seconds or [0.0]) for f in (max, median))
        return (
            f"ledger: {len(self.seconds)} of {self.losses} losses of its node recovered, median {middle:.1f} s, worst "
            f"{worst:.1f} s; {self.accounts} exit status of the run: {self.status}"
        )


class Losses:
    """One run, whose ledger's node is lost whenever it goes on again."""

    def __init__(self, folder: Path) -> None:
        self._disks = folder.parent / "disks"
        self._raylets = Raylets(workers=2, num_gpus=GPUS, resources={"ledger": 1})
        self.driver = Driver(
            folder,
            [
                *OVERRIDES,
                f"cluster.address={self._raylets.address}",
                "cluster.buffer_resources.ledger=1",
                "buffer.copy_to=run",
                f"buffer.local_dir={self._disks}",
                f"engine.tensor_parallel_size={GPUS_PER_WORKER}",
                f"rollout.gpus_per_worker={GPUS_PER_WORKER}",
                f"tiny.heads={2 * GPUS_PER_WORKER}",
                "rollout.cpus_per_worker=0",
                "learner.ranks=1",
            ],
        )

    def lose(self) -> float:
        """From a run that moves to a run that moves; returns the seconds that it took."""
        self.moves()
        node = self._node()
        disks = list(self._disks.iterdir())
        assert len(disks) == 1, f"the ledger is on one disk: {disks}"
        self._raylets.hit(node, KILL)
        seconds = until(lambda: self._node() not in ("", node), LIMIT_SECONDS, "the ledger on another node")
        shutil.rmtree(disks[0], ignore_errors=True)
        self._raylets.replace(node)
        return seconds + until(self.driver.steps_from_now(1), LIMIT_SECONDS, "a learner step")

    def moves(self) -> None:
        """Wait for a run with its workers placed as asked, and for two steps of it."""
        until(self._placed, LIMIT_SECONDS, "a run with all of its parts where they belong")
        until(self.driver.steps_from_now(2), LIMIT_SECONDS, "two learner steps")

    def close(self) -> None:
        self.driver.stop()
        self._raylets.close()

    def _placed(self) -> bool:
        serving = [
            part["node"]
            for part in self.driver.roster()
            if part["part"].startswith("rollout") and part["state"] == "serving"
        ]
        assert max(Counter(serving).values(), default=0) * GPUS_PER_WORKER <= GPUS
        return (
            self.driver.alive()
            and len(serving) == 2
            and all(map(self._raylets.has, [*serving, self._node()]))
        )

    def _node(self) -> str:
        """Where the ledger is; empty while it is nowhere."""
        found = [part["node"] for part in self.driver.roster() if part["part"] == "replay buffer"]
        return str(found[0]) if found else ""


def run(folder: Path, losses: int, say: Callable[[str], None] = print) -> Result:
    """Lose the ledger's node so many times, then let the run end."""
    job = Losses(folder)
    seconds: list[float] = []
    try:
        job.driver.start()
        for number in range(losses):
            try:
                seconds.append(job.lose())
            except TimeoutError as error:
                say(f"{number + 1}/{losses} {error}; {job.driver.tail(3)}")
                break
            say(f"{number + 1}/{losses} the ledger's node: {seconds[-1]:.1f} s")
        job.moves()
        job.driver.stop()
        status = finish(job.driver, LIMIT_SECONDS)
    finally:
        job.close()
    return Result(losses, seconds, accounts(job.driver, GROUPS_PER_STEP), status)
