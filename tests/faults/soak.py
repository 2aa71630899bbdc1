"""Hours at full rate: what the parts of a run hold, in memory and open files, as time goes by.

Scripted engines answer at once, so that the ring itself is what works: two rollout workers, the replay buffer, the
learner and the driver, on a local Ray, with a bounded disk. Every minute each part's resident memory and open files are
read from /proc and appended to FOLDER.jsonl. A part is flat when it holds at the end what it held after the warm-up.

    python -m tests.faults soak --minutes 120 --folder DIR
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from tests.faults.matrix import RECOVERY_SECONDS, finish
from tests.faults.run import Accounts, Driver, accounts, until

GROUPS_PER_STEP = 4
EVERY_SECONDS = 60.0
OVERRIDES = (
    "steps=100000000",
    "evaluation.tasks=0",
    f"buffer.groups_per_step={GROUPS_PER_STEP}",
    "buffer.max_lag=1",
    "buffer.disk_gib=0.05",
    "buffer.segment_mib=4",
    "rollout.workers=2",
    "rollout.concurrent_groups=4",
    "env.options.size=4",
    "env.options.max_turns=12",
    "learner.optim.learning_rate=1e-4",
    "cluster.learner_cpus=0",
    "checkpoint.every_steps=20",
)
# What one process may hold more at the end than after the warm-up: allocators and SQLite's cache settle slowly.
MORE_MIB, MORE_SHARE, MORE_FILES = 8.0, 0.05, 4


@dataclass(frozen=True)
class Holding:
    """What one part held: medians of the first tenth after the warm-up and of the last tenth."""

    part: str
    mib_first: float
    mib_last: float
    files_first: int
    files_last: int

    @property
    def flat(self) -> bool:
        allowed = max(MORE_MIB, MORE_SHARE * self.mib_first)
        return self.mib_last - self.mib_first <= allowed and self.files_last - self.files_first <= MORE_FILES


@dataclass(frozen=True)
class Result:
    """A soak: how long, what went through, what each part held."""

    minutes: float
    groups: int
    turns: int
    run_mib: float  # of the run folder at the end
    holdings: tuple[Holding, ...]
    accounts: Accounts
    status: int

    @property
    def sound(self) -> bool:
        return not self.status and self.accounts.sound and all(holding.flat for holding in self.holdings)


def run(folder: Path, minutes: float, say: Callable[[str], None] = print) -> Result:
    """Run for so long; the first sixth of it is the warm-up."""
    driver = Driver(folder, OVERRIDES, {"MANTA_FAULTS_LATENCY_S": "0"})
    samples: list[dict[str, tuple[float, int]]] = []
    try:
        driver.start()
        until(driver.steps_from_now(3), RECOVERY_SECONDS, "the first steps")
        ends = time.monotonic() + 60 * minutes
        with folder.with_suffix(".jsonl").open("a", encoding="utf-8") as log:
            while time.monotonic() < ends:
                time.sleep(min(EVERY_SECONDS, 60 * minutes / 30))
                samples.append(_sample(driver))
                log.write(json.dumps({"time": time.time(), "parts": samples[-1]}) + "\n")
                log.flush()
                say(", ".join(f"{part} {mib:.0f} MiB {files}" for part, (mib, files) in samples[-1].items()))
        driver.stop()
        status = finish(driver)
    finally:
        driver.stop()
    (groups,) = driver.query("SELECT count(*) FROM groups WHERE state = 'trained'")[0]
    return Result(
        minutes=minutes,
        groups=groups,
        turns=sum(path.read_bytes().count(b"\n") for path in (folder / "sampled").glob("*")),
        run_mib=sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 2**20,
        holdings=_holdings(samples[len(samples) // 6 :]),
        accounts=accounts(driver, GROUPS_PER_STEP),
        status=status,
    )


def _sample(driver: Driver) -> dict[str, tuple[float, int]]:
    """Resident MiB and open files of every part; one that is gone is an error of its own."""
    pids = {"driver": driver.pid} | {part["part"]: part["pid"] for part in driver.roster()}
    page = os.sysconf("SC_PAGE_SIZE")
    return {
        part: (
            int(Path(f"/proc/{pid}/statm").read_text(encoding="utf-8").split()[1]) * page / 2**20,
            len(os.listdir(f"/proc/{pid}/fd")),
        )
        for part, pid in pids.items()
    }


def _holdings(samples: Sequence[dict[str, tuple[float, int]]]) -> tuple[Holding, ...]:
    tenth = max(1, len(samples) // 10)
    first, last = samples[:tenth], samples[-tenth:]

    def middle(some: Sequence[dict[str, tuple[float, int]]], part: str, which: int) -> float:
        return float(median(sample[part][which] for sample in some))

    return tuple(
        Holding(
            part,
            round(middle(first, part, 0), 1),
            round(middle(last, part, 0), 1),
            round(middle(first, part, 1)),
            round(middle(last, part, 1)),
        )
        for part in samples[0]
    )
