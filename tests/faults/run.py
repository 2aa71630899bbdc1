"""A run as an injector sees it: a driver process, the run's own files, and the processes that can be hit."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RECIPE = str(ROOT / "tests" / "deploy" / "small.toml")


class Driver:
    """The command of one run, started, killed, started again in the same folder."""

    def __init__(
        self, folder: Path, overrides: Sequence[str], environment: dict[str, str] | None = None
    ) -> None:
        self.folder = folder
        self._overrides = list(overrides)
        self._environment = environment or {}
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self, stored: bool = False) -> None:
        """Start the run, or go on with it; `stored`: as its folder says, whatever it was begun with."""
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        job = [sys.executable, "-m", "tests.faults.job", "train"]
        begun = [RECIPE, "--run-dir", str(self.folder), *self._overrides]
        command = [*job, "--resume", str(self.folder)] if stored else [*job, *begun]
        environment = os.environ | self._environment | {
            "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", "RAY_DEDUP_LOGS": "0",
        }  # fmt: skip
        self._process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=self.output.open("ab"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    @property
    def output(self) -> Path:
        return self.folder.with_suffix(".log")

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def kill_session(self) -> None:
        """SIGKILL to everything the driver's session holds."""
        os.killpg(self.pid, signal.SIGKILL)
        self.wait(30)

    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def wait(self, seconds: float) -> int:
        """The exit status; TimeoutExpired says that it did not end."""
        assert self._process is not None
        return self._process.wait(seconds)

    def stop(self) -> None:
        """As a person stops it; by force where that does not end it."""
        if self.alive():
            self.signal(signal.SIGTERM)
            try:
                self.wait(90)
            except subprocess.TimeoutExpired:
                self.kill_session()

    # What the run says about itself -------------------------------------------------------------------------------

    def roster(self) -> list[dict[str, Any]]:
        try:
            parts: list[dict[str, Any]] = json.loads(
                (self.folder / "roster.json").read_text(encoding="utf-8")
            )
        except FileNotFoundError:
            return []
        return parts

    def consumed(self) -> list[dict[str, Any]]:
        """Every learner step ever made, those of lost learners too; a line for each rank."""
        path = self.folder / "consumed.jsonl"
        if not path.is_file():
            return []
        return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]

    def steps_from_now(self, count: int) -> Callable[[], bool]:
        """Whether so many more learner steps were made since this call."""

        def made() -> int:
            return sum(row["rank"] == 0 for row in self.consumed())

        wanted = made() + count
        return lambda: made() >= wanted

    def sampled(self) -> list[tuple[float, int, int]]:
        """(time, seed, tokens) of every completion, in order of time."""
        found = []
        for path in (self.folder / "sampled").glob("*"):
            for line in path.read_text(encoding="utf-8").split("\n")[:-1]:
                when, seed, tokens = line.split()
                found.append((float(when), int(seed), int(tokens)))
        return sorted(found)

    def at(self, moment: str) -> bool:
        return (self.folder / "moments" / moment).exists()

    def tail(self, lines: int = 15) -> str:
        return "\n".join(self.output.read_text(errors="replace", encoding="utf-8").splitlines()[-lines:])

    def query(self, sql: str) -> list[Any]:
        with sqlite3.connect(f"file:{self.folder / 'ledger.sqlite'}?mode=ro", uri=True) as db:
            return db.execute(sql).fetchall()


def children(pid: int) -> Iterator[int]:
    """All descendants of a process."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()[1])
            except OSError:
                continue
            parents.setdefault(parent, []).append(int(entry.name))
    found = list(parents.get(pid, []))
    while found:
        child = found.pop()
        yield child
        found += parents.get(child, [])


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def until(holds: Any, seconds: float, what: str, poll: float = 0.05) -> float:
    """Seconds until `holds()` is true; TimeoutError says what did not come."""
    began = time.monotonic()
    while not holds():
        if time.monotonic() - began > seconds:
            raise TimeoutError(f"{what} did not come within {seconds:g} s")
        time.sleep(poll)
    return time.monotonic() - began


@dataclass(frozen=True)
class Accounts:
    """What a ledger and the learner's own log say about a run, each read by itself."""

    issued: int
    trained: int
    dropped: int
    in_flight: int
    lost: int  # group ids that are in no state
    twice: int  # groups that the surviving line of learner steps consumed more than once
    stray: int  # groups that the surviving line consumed and the ledger does not call trained, or the other way round
    short_steps: int  # versions that were not trained on exactly a step's groups

    @property
    def sound(self) -> bool:
        """Nothing lost, nothing trained twice, and both books agree."""
        return not (self.lost or self.twice or self.stray or self.short_steps)


def accounts(driver: Driver, groups_per_step: int) -> Accounts:
    """Read after the driver has ended."""
    states = dict(driver.query("SELECT state, count(*) FROM groups GROUP BY state"))
    (newest,) = driver.query("SELECT max(group_id) FROM groups")[0]
    issued = sum(states.values())
    trained = states.pop("trained", 0)
    dropped = states.pop("dropped", 0)
    per_step = dict(
        driver.query(
            "SELECT taken_version, count(*) FROM groups WHERE state = 'trained' GROUP BY 1 ORDER BY 1"
        )
    )
    checkpointed = max(per_step, default=-1)
    # A step that a restarted learner made again stands in the log again: the last one is the one that counts.
    line = {(row["version"], row["rank"]): row["groups"] for row in driver.consumed()}
    surviving = Counter(
        group for (version, _), groups in line.items() if version <= checkpointed for group in groups
    )
    in_ledger = {group for (group,) in driver.query("SELECT group_id FROM groups WHERE state = 'trained'")}
    return Accounts(
        issued=issued,
        trained=trained,
        dropped=dropped,
        in_flight=sum(states.values()),
        lost=(newest + 1 if newest is not None else 0) - issued,
        twice=sum(count - 1 for count in surviving.values()),
        stray=len(set(surviving) ^ in_ledger),
        short_steps=sum(per_step.get(version, 0) != groups_per_step for version in range(checkpointed + 1)),
    )
