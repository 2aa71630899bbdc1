"""The whole job killed again and again at lag 0: it must end where the uninterrupted one ends, bit for bit.

Kills come at random moments, in a weight sync and in a checkpoint; each is followed by the same command again.
"""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.deploy.small_run import same_bits
from tests.faults.run import Accounts, Driver, accounts, until

GROUPS_PER_STEP = 2
START_SECONDS = 120.0
END_SECONDS = 600.0
MOMENTS = ("random", "sync", "checkpoint", "early")
OVERRIDES = (
    "evaluation.tasks=0",
    "stages.0.source.episodes=32",
    "buffer.max_lag=0",
    "checkpoint.every_steps=3",
    "env.options.size=4",
    "env.options.max_turns=12",
    "supervision.max_restarts=0",
)


@dataclass(frozen=True)
class Result:
    """What the kills left."""

    kills: int
    same_parameters: bool
    same_tasks: bool
    accounts: Accounts
    status: int

    @property
    def sound(self) -> bool:
        return self.same_parameters and self.same_tasks and not self.status and self.accounts.sound


def run(
    folder: Path, kills: int, extra: Sequence[str] = (), say: Callable[[str], None] = print, seed: int = 0
) -> Result:
    """The uninterrupted run in FOLDER/reference, the killed one in FOLDER/killed."""
    steps = max(12, 2 * kills + 4)
    overrides = [*OVERRIDES, f"steps={steps}", *extra]
    reference = Driver(folder / "reference", overrides)
    reference.start()
    if status := reference.wait(END_SECONDS):
        raise RuntimeError(f"the uninterrupted run ended with {status}: {reference.tail()}")
    chance, killed = random.Random(seed), Driver(folder / "killed", overrides)
    done = 0
    while done < kills:
        killed.start()
        moment = MOMENTS[done % len(MOMENTS)]
        _wait_for(killed, moment, chance)
        if not killed.alive():
            say(f"the run ended before kill {done + 1}: {killed.tail(2)}")
            break
        killed.signal(signal.SIGKILL)
        killed.wait(30)
        done += 1
        at = max((row["version"] for row in killed.consumed()), default=-1) + 1
        say(f"kill {done}/{kills} ({moment}) at step {at}")
    killed.start()
    status = killed.wait(END_SECONDS)
    tasks = "SELECT group_id, env_id, env_options, seed FROM groups WHERE state = 'trained' ORDER BY 1"
    return Result(
        kills=done,
        same_parameters=same_bits(reference.folder, killed.folder),
        same_tasks=reference.query(tasks) == killed.query(tasks),
        accounts=accounts(killed, GROUPS_PER_STEP),
        status=status,
    )


def _wait_for(driver: Driver, moment: str, chance: random.Random) -> None:
    if moment == "early":  # before the run has come to its first step since the start
        time.sleep(chance.uniform(0.5, 12))
        return
    made = driver.steps_from_now(1)
    until(lambda: made() or not driver.alive(), START_SECONDS, "a step")
    if moment == "random":
        time.sleep(chance.uniform(0, 0.5))
    else:
        until(lambda: driver.at(moment) or not driver.alive(), START_SECONDS, moment, poll=0.002)
        time.sleep(chance.uniform(0, 0.1))
