"""Progress of a run: a live display in a terminal, otherwise occasional plain lines.

A run enters `Progress`, opens a `phase` for each part that is not a step, then calls `begin_steps` once and `update`
after every step.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from deploy.report import console as door
from deploy.report.bottleneck import Shares
from deploy.report.console import Bars, Console, LiveDisplay, Numbers, Part
from rollout.wire.metrics import Row

SHOWN_STEPS = 10  # rows of the table, and steps of the bottleneck's verdict
PLAIN_STRIDE = 5  # steps between plain lines
PLAIN_SECONDS = 60.0  # longest time without a plain line
PLAIN_PARTS = 4  # plain lines of a phase

# Column, key of the row, format.
COLUMNS = (
    ("step", "step", "{:.0f}"),
    ("reward", "reward", "{:.3f}"),
    ("success", "success", "{:.1%}"),
    ("entropy", "entropy", "{:.3f}"),
    ("KL", "kl", "{:.4f}"),
    ("rollout\ntok/s", "rollout_tokens_per_s", "{:,.0f}"),
    ("learner\ntok/s", "learner_tokens_per_s", "{:,.0f}"),
    ("lag\nmean", "lag_mean", "{:.2f}"),
    ("lag\nmax", "lag_max", "{:.0f}"),
    ("stall\nms", "sync_stall_ms", "{:.0f}"),
)
ABSENT = "–"  # an environment without a verdict has no success


class Phase:
    """A part of the run besides its steps: a bar, or plain lines."""

    def __init__(self, progress: Progress, name: str, total: int) -> None:
        self._progress = progress
        self._name = name
        self._total = total
        self._done = 0
        self._bar = progress.bars.add(name, total)

    def advance(self, n: int = 1, **shown: float) -> None:
        """Advance by n units. shown: numbers printed beside the bar."""
        before, self._done = self._done, self._done + n
        text = "  ".join(f"{name} {value:.4g}" for name, value in shown.items())
        self._progress.bars.move(self._bar, self._done, text)
        if self._total and self._done * PLAIN_PARTS // self._total > before * PLAIN_PARTS // self._total:
            self._progress.plain_line(f"{self._name}  {self._done}/{self._total}  {text}")
        self._progress.doing = f"{self._name}  {self._done}/{self._total}  {text}"


class Progress:
    """The display of one run. All methods are called from the driver's thread.

    prefix: begins the lines of one of several that share a console; there is no live display then. Without a terminal
    a second thread prints the current activity after PLAIN_SECONDS without a line. log: a file that gets every plain
    line, with or without a terminal.
    """

    def __init__(
        self,
        total_steps: int,
        title: str,
        console: Console | None = None,
        log: Path | None = None,
        *,
        prefix: str = "",
    ) -> None:
        self._console = console or door.output()
        self._log = log
        self._total_steps = total_steps
        self._title = title
        self._rows: deque[Row] = deque(maxlen=SHOWN_STEPS)
        self._began = time.monotonic()
        self.bars = Bars(self._console)
        self._steps_bar: int | None = None
        self._prefix = prefix and f"{prefix}: "
        live = self._console.is_terminal and not prefix
        self._live = LiveDisplay(self._console, self._parts) if live else None
        self.doing = "starting"
        self._said = self._began  # when the last plain line was written
        self._over = threading.Event()
        self._ticker = threading.Thread(target=self._tick, name="progress", daemon=True)

    def __enter__(self) -> Self:
        self.plain_line(self._title)
        if self._live:
            self._live.start()
        else:
            self._ticker.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()
        else:
            self._over.set()
            self._ticker.join()

    @contextmanager
    def phase(self, name: str, total: int) -> Iterator[Phase]:
        """Open a part of the run besides its steps. total: its number of units."""
        self.doing = f"{name}  0/{total}"
        yield Phase(self, name, total)
        self.doing = f"after {name}"

    def begin_steps(self, done: int = 0) -> None:
        """Start the steps' bar. done: steps made before the run was resumed."""
        self._steps_bar = self.bars.add("steps", self._total_steps, done)
        self.doing = f"step {done + 1}/{self._total_steps}"

    def update(self, step: int, row: Row) -> None:
        """Show a finished step by the keys in COLUMNS."""
        if self._steps_bar is None:
            raise ValueError(f"step {step} was shown before begin_steps()")
        row = {"step": step} | row
        self._rows.append(row)
        self.bars.move(self._steps_bar, step)
        self.doing = f"step {step + 1}/{self._total_steps}" if step < self._total_steps else "finishing"
        at_end = len(self._rows) == 1 or step == self._total_steps
        if at_end or step % PLAIN_STRIDE == 0 or self.silent_seconds() >= PLAIN_SECONDS / 2:
            shown = "  ".join(
                f"{name} {_written(row, key, form)}" for name, key, form in COLUMNS[1:]
            ).replace("\n", " ")
            bound, _, _ = Shares.of(self._rows).verdict.partition(";")
            self.plain_line(f"step {step}/{self._total_steps}  {shown}  {bound}")

    def say(self, text: str) -> None:
        """Print one permanent line."""
        if self._live:
            door.write(self._console, text, wrap=True)
        self.plain_line(text)

    def plain_line(self, text: str) -> None:
        """Print a line with the run's clock, unless there is a live display; the log gets it in any case."""
        line = f"[{time.monotonic() - self._began:7.1f} s] {self._prefix}{text.rstrip()}"
        if self._log is not None:
            # A full disk pauses a run and does not end it.
            with suppress(OSError), self._log.open("a", encoding="utf-8", errors="backslashreplace") as log:
                log.write(door.visible(line) + "\n")
        if not self._live:
            door.write(self._console, line)
            self._said = time.monotonic()

    def silent_seconds(self) -> float:
        """Seconds since the last plain line."""
        return time.monotonic() - self._said

    def break_silence(self) -> float:
        """Print the current activity after PLAIN_SECONDS without a line; returns the seconds until the next check."""
        if self.silent_seconds() >= PLAIN_SECONDS:
            self.plain_line(f"{self.doing.rstrip()}: under way")
        return PLAIN_SECONDS - self.silent_seconds()

    def _tick(self) -> None:
        while not self._over.wait(max(self.break_silence(), 0.1)):
            pass

    def _parts(self) -> list[Part]:
        parts: list[Part] = [(self._title, "bold"), self.bars]
        if self._rows:
            parts += [step_table(self._rows), (Shares.of(self._rows).verdict, "dim")]
        return parts


def step_table(rows: deque[Row]) -> Numbers:
    """The last steps, one row each."""
    return Numbers(
        [name for name, _, _ in COLUMNS],
        [[_written(row, key, form) for _, key, form in COLUMNS] for row in rows],
    )


def _written(row: Row, key: str, form: str) -> str:
    return form.format(row[key]) if key in row else ABSENT
