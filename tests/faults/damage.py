"""Every file of a killed run damaged, one at a time, and the run resumed.

It must end bit-identical to the untouched run, or refuse in one line that names the file: never a traceback, never
another state. The runs are small, without Ray; each command is a process forked from this one, whose imports it
saves.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import deploy.run.local
from deploy import cli
from deploy.run.local import LocalRuntime
from tests.deploy.small_run import RECIPE, same_bits

KILLED_AT = 3  # the learner step that SIGKILL comes in
OVERRIDES = ("checkpoint.every_steps=1", "engine.kind=transformers")
SAME, REFUSED, TRACEBACK, OTHER = "the same bits", "refused in a line", "traceback", "another state"
NOT_READ = (".lock", "-shm")  # empty, or rebuilt by SQLite itself


@dataclass(frozen=True)
class Case:
    """What was done to one file, and how resuming ended; `said` is its last line."""

    file: str
    damage: str
    verdict: str
    said: str


@dataclass(frozen=True)
class Result:
    """All cases."""

    cases: tuple[Case, ...]

    @property
    def sound(self) -> bool:
        return all(case.verdict in (SAME, REFUSED) for case in self.cases)

    def __str__(self) -> str:
        counted = Counter(case.verdict for case in self.cases)
        return f"damage: {len(self.cases)} cases: " + ", ".join(f"{n} {name}" for name, n in counted.items())


def run(folder: Path, say: Callable[[str], None] = print, only: str = "", seed: int = 0) -> Result:
    """The untouched run in FOLDER/reference, the killed one in FOLDER/killed; `only`: files with this in their path."""
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    started = ("train", RECIPE, *OVERRIDES, "--run-dir")
    for name, dies in (("reference", False), ("killed", True)):
        status, said = manta(folder / "log", *started, str(folder / name), dies=dies)
        if status != (-signal.SIGKILL if dies else 0):
            raise RuntimeError(f"the run {name} ended with {status}: {said}")
    rng, cases = random.Random(seed), []
    for file in filter(lambda name: only in name, _files(folder / "killed")):
        for damage, how in _damages(rng):
            case = folder / "case"
            shutil.rmtree(case, ignore_errors=True)
            shutil.copytree(folder / "killed", case)
            path = case / file
            path.write_bytes(how(path.read_bytes()))
            status, said = manta(folder / "log", "train", "--resume", str(case))
            cases.append(Case(file, damage, _verdict(folder, case, status, said), said.rpartition("\n")[2]))
            say(f"{cases[-1].verdict:18} {damage:10} {file}  {cases[-1].said if status else ''}")
    return Result(tuple(cases))


def manta(log: Path, *command: str, dies: bool = False) -> tuple[int, str]:
    """Run a command of the local runtime in a forked process: its exit status, and what it said on standard error."""

    def run_command() -> None:
        with log.open("wb") as out:
            os.dup2(out.fileno(), 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if dies:
            deploy.run.local.LocalRuntime = _Dying  # type: ignore[misc]
        sys.argv = ["manta", *command, "--local"]
        cli.main()

    return _forked(run_command), log.read_text(encoding="utf-8", errors="replace").strip()


def _forked(call: Callable[[], None]) -> int:
    """The exit status of a call in a forked process. The parent computes nothing: no thread of torch is lost."""
    child = os.fork()
    if not child:
        try:
            call()
        except SystemExit as end:
            os._exit(int(end.code or 0))
        except BaseException:
            sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
            os._exit(70)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


class _Dying(LocalRuntime):
    """A runtime that is killed in a step."""

    async def step(self, number: int, before_publish: Any = None, ahead: bool = False) -> dict[str, Any]:
        if number == KILLED_AT:
            os.kill(os.getpid(), signal.SIGKILL)
        return await super().step(number, before_publish, ahead)


def _files(killed: Path) -> list[str]:
    found = (path for path in killed.rglob("*") if path.is_file() and path.stat().st_size)
    names = sorted(str(path.relative_to(killed)) for path in found)
    return [name for name in names if not name.endswith(NOT_READ) and not name.startswith("tensorboard")]


def _damages(rng: random.Random) -> Iterator[tuple[str, Callable[[bytes], bytes]]]:
    def flipped(data: bytes) -> bytes:
        at = rng.randrange(len(data))
        return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]

    yield "bit flipped", flipped
    yield "bit flipped", flipped
    yield "cut in half", lambda data: data[: len(data) // 2]
    yield "zeroed", lambda data: bytes(len(data))


def _verdict(folder: Path, case: Path, status: int, said: str) -> str:
    if status:
        return TRACEBACK if "Traceback" in said or status < 0 else REFUSED

    def compare() -> None:
        sys.exit(not same_bits(folder / "reference", case))

    return SAME if not _forked(compare) else OTHER
