"""Faults with the real vLLM: what a lost worker or engine samples again, and whether a stored turn ever changes.

Episodes of up to eight turns on a local Ray; the engine's own process is killed and frozen while turns run, during a
weight sync and during a checkpoint. A turn has one seed for ever, so a seed that was sampled twice is a turn that was
sampled again. Then everything is killed and resumed, and every turn that was durable before is looked for in what is
stored afterwards.
"""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rollout.buffer.journal import read_journal
from rollout.buffer.segments import read_rows
from tests.faults.job import LATENCY, REAL
from tests.faults.matrix import finish
from tests.faults.run import Accounts, Driver, accounts, children, command_of, until

GROUPS_PER_STEP = 4
SECONDS = 240.0
TURN_SECONDS = 0.6  # a turn of a tiny model takes a hundredth of that; of one worth training, more
MOMENTS = ("turns", "sync", "checkpoint")
OVERRIDES = (
    "steps=1000000",
    "evaluation.tasks=0",
    "stages.0.source.episodes=32",
    f"buffer.groups_per_step={GROUPS_PER_STEP}",
    "buffer.max_lag=1",
    "rollout.workers=1",
    "rollout.concurrent_groups=4",
    "engine.kv_cache_gib=0.25",
    "env.options.size=4",
    "env.options.max_turns=8",
    "checkpoint.every_steps=1",
    "supervision.heartbeat_interval_seconds=0.5",
    "supervision.heartbeat_timeout_seconds=5",
    "supervision.max_restarts=100",
)
RUNNING = 4 * 4  # episodes at a time
FAULTS = (
    ("worker", signal.SIGKILL, "turns"),
    *(("engine", number, moment) for moment in MOMENTS for number in (signal.SIGKILL, signal.SIGSTOP)),
)


@dataclass(frozen=True)
class Result:
    """What each fault had sampled again, how long it took, and what became of stored turns."""

    turns_again: dict[str, int]
    seconds: dict[str, float]
    turns_before: int  # durable when everything was killed
    turns_kept: int  # of them in the rows at the end, bit for bit
    turns_changed: int  # with the same group, attempt, episode and turn, but another token, logprob or reward
    accounts: Accounts
    status: int

    @property
    def sound(self) -> bool:
        few = all(count <= RUNNING for count in self.turns_again.values())
        return few and not self.turns_changed and not self.status and self.accounts.sound


def run(folder: Path, say: Callable[[str], None] = print) -> Result:
    """Kill the worker, kill and freeze its engine, then kill everything and resume."""
    driver = Driver(
        folder, list(OVERRIDES), {REAL: "1", LATENCY: str(TURN_SECONDS), "VLLM_LOGGING_LEVEL": "ERROR"}
    )
    again: dict[str, int] = {}
    seconds: dict[str, float] = {}
    try:
        driver.start()
        for victim, number, moment in FAULTS:
            name = f"{victim} {number.name} {moment}"
            _steps(driver, 2)
            before, old = Counter(seed for _, seed, _ in driver.sampled()), _worker(driver)
            _await(driver, moment)
            os.kill(VICTIMS[victim](driver), number)
            began = time.monotonic()
            until(lambda: _worker(driver) not in (old, 0), SECONDS, f"another worker after {name}")  # noqa: B023
            _steps(driver, 2)
            seconds[name] = round(time.monotonic() - began, 1)
            after = Counter(seed for _, seed, _ in driver.sampled())
            again[name] = sum(count - 1 for count in after.values()) - sum(c - 1 for c in before.values())
            say(f"{name}: {seconds[name]} s, {again[name]} turns again")
        driver.signal(signal.SIGKILL)
        driver.wait(30)
        time.sleep(1)
        before_rows = _stored(folder)
        status = finish(driver)
    finally:
        driver.stop()
    end = _stored(folder)
    by_turn = {key[0:1] + key[2:]: value for key, value in end.items()}  # whatever the attempt
    return Result(
        turns_again=again,
        seconds=seconds,
        turns_before=len(before_rows),
        turns_kept=sum(by_turn.get(key[0:1] + key[2:]) == value for key, value in before_rows.items()),
        turns_changed=sum(key in end and end[key] != value for key, value in before_rows.items()),
        accounts=accounts(driver, GROUPS_PER_STEP),
        status=status,
    )


def _stored(folder: Path) -> dict[tuple[int, int, int, int], Any]:
    """(group, attempt, episode, turn) -> what was sampled and earned, of every durable turn."""
    rows = read_rows(folder / "groups").to_pylist()
    for path in sorted((folder / "turns").glob("*.journal")):
        rows += [row for batch in read_journal(path)[0] for row in batch.to_pylist()]
    return {
        (row["group_id"], row["attempt"], row["episode"], row["turn"]): (
            row["action_ids"],
            row["behavior_logprobs"],
            row["versions"],
            row["reward"],
        )
        for row in rows
    }


def _worker(driver: Driver) -> int:
    """The pid of the serving worker; 0 while none serves."""
    return next(
        (p["pid"] for p in driver.roster() if p["part"].startswith("rollout") and p["state"] == "serving"), 0
    )


def _engine(driver: Driver) -> int:
    return next(pid for pid in children(_worker(driver)) if "EngineCore" in command_of(pid))


VICTIMS = {"worker": _worker, "engine": _engine}


def _await(driver: Driver, moment: str) -> None:
    if moment == "turns":
        time.sleep(1.5 * TURN_SECONDS)  # in the midst of the episodes that the last step has made room for
    else:
        until(lambda: driver.at(moment), SECONDS, f"the moment {moment!r}", poll=0.002)


def _steps(driver: Driver, count: int) -> None:
    made = driver.steps_from_now(count)
    until(lambda: made() or not driver.alive(), SECONDS, f"{count} learner steps")
    if not driver.alive():
        raise RuntimeError(driver.tail())
