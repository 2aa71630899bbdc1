"""A running job grown and shrunk by `manta scale`, on simulated nodes: nothing lost, nothing twice."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.faults.matrix import GROUPS_PER_STEP, OVERRIDES, RECOVERY_SECONDS, Raylets, finish
from tests.faults.run import ROOT, Accounts, Driver, accounts, until


@dataclass(frozen=True)
class Result:
    """Seconds from each `manta scale` until that many workers served, and the books at the end."""

    seconds: dict[str, float]
    accounts: Accounts
    status: int

    @property
    def sound(self) -> bool:
        return not self.status and self.accounts.sound and max(self.seconds.values()) < 60


def run(folder: Path, sizes: Sequence[int] = (4, 1), say: Callable[[str], None] = print) -> Result:
    """Begin with two workers, then have each of `sizes` in turn, with learner steps in between."""
    raylets = Raylets(workers=max(2, *sizes))
    driver = Driver(folder, [*OVERRIDES, f"cluster.address={raylets.address}"])
    seconds: dict[str, float] = {}

    def serving() -> int:
        states = [part["state"] for part in driver.roster() if part["part"].startswith("rollout")]
        return len(states) if set(states) == {"serving"} else -1

    def steps(count: int) -> None:
        until(driver.steps_from_now(count), RECOVERY_SECONDS, f"{count} steps")

    try:
        driver.start()
        before = 2
        until(lambda: serving() == before, RECOVERY_SECONDS, "the first workers")
        steps(3)
        for size in sizes:
            scale = [sys.executable, "-m", "deploy.cli", "scale", str(folder), "--workers", str(size)]
            began = time.monotonic()  # the command itself takes a few seconds
            subprocess.run(scale, check=True, cwd=ROOT, capture_output=True, timeout=60)
            until(lambda: serving() == size, RECOVERY_SECONDS, f"{size} workers")  # noqa: B023
            seconds[f"{before} -> {size}"] = round(time.monotonic() - began, 1)
            say(f"{before} -> {size} workers: {seconds[f'{before} -> {size}']} s")
            before = size
            steps(5)
        driver.stop()
        status = finish(driver)
    finally:
        driver.stop()
        raylets.close()
    return Result(seconds, accounts(driver, GROUPS_PER_STEP), status)
