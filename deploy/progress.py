"""What a person sees while a run goes on: live in a terminal, one plain line now and then elsewhere.

A run enters `Progress`, opens a `phase` for each part that is not a step, then says `begin_steps` once and `update`
after every step.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

from deploy.metrics import Row
from deploy.shares import Shares

SHOWN_STEPS = 10  # rows of the table; the verdict is over the same steps
PLAIN_STRIDE = 5  # steps from one plain line to the next
PLAIN_PARTS = 4  # plain lines of a phase

# Column, key of the row, how it is written.
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
    """One bar besides the steps, or its plain lines."""

    def __init__(self, progress: Progress, name: str, total: int) -> None:
        self._progress = progress
        self._name = name
        self._total = total
        self._done = 0
        self._bar = progress.bars.add_task(name, total=total, shown="")

    def advance(self, n: int = 1, **shown: float) -> None:
        """n more of the total are done; `shown` are numbers worth seeing beside the bar."""
        before, self._done = self._done, self._done + n
        text = "  ".join(f"{name} {value:.4g}" for name, value in shown.items())
        self._progress.bars.update(self._bar, completed=self._done, shown=text)
        if self._total and self._done * PLAIN_PARTS // self._total > before * PLAIN_PARTS // self._total:
            self._progress.plain_line(f"{self._name}  {self._done}/{self._total}  {text}")


class Progress:
    """The display of one run. Everything is called from the driver's one thread."""

    def __init__(self, total_steps: int, title: str, console: Console | None = None) -> None:
        self._console = console or Console()
        self._total_steps = total_steps
        self._title = title
        self._rows: deque[Row] = deque(maxlen=SHOWN_STEPS)
        self._began = time.monotonic()
        self.bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[shown]}"),
            console=self._console,
            expand=True,
        )
        self._steps_bar: TaskID | None = None
        self._live = (
            Live(console=self._console, get_renderable=self._render) if self._console.is_terminal else None
        )

    def __enter__(self) -> Self:
        self.plain_line(self._title)
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()

    @contextmanager
    def phase(self, name: str, total: int) -> Iterator[Phase]:
        """A part of the run that is not its steps, `total` units long."""
        yield Phase(self, name, total)

    def begin_steps(self, done: int = 0) -> None:
        """The steps begin; `done` of them were done before the run was resumed."""
        self._steps_bar = self.bars.add_task("steps", total=self._total_steps, completed=done, shown="")

    def update(self, step: int, row: Row) -> None:
        """One step is done; see COLUMNS for the keys that are shown."""
        if self._steps_bar is None:
            raise ValueError(f"step {step} was shown before begin_steps()")
        row = {"step": step} | row
        self._rows.append(row)
        self.bars.update(self._steps_bar, completed=step)
        if step == 1 or step % PLAIN_STRIDE == 0 or step == self._total_steps:
            shown = "  ".join(
                f"{name} {_written(row, key, form)}" for name, key, form in COLUMNS[1:]
            ).replace("\n", " ")
            bound, _, _ = Shares.of(self._rows).verdict.partition(";")
            self.plain_line(f"step {step}/{self._total_steps}  {shown}  {bound}")

    def say(self, text: str) -> None:
        """One line that stays."""
        if self._live:
            self._console.print(text, highlight=False)
        else:
            self.plain_line(text)

    def plain_line(self, text: str) -> None:
        """A line with the run's clock, where there is no live display."""
        if not self._live:
            clock = f"[{time.monotonic() - self._began:7.1f} s] "
            self._console.print(clock + text.rstrip(), highlight=False, markup=False, soft_wrap=True)

    def _render(self) -> Group:
        parts: list[Text | Table | Bars] = [Text(self._title, style="bold"), self.bars]
        if self._rows:
            parts += [step_table(self._rows), Text(Shares.of(self._rows).verdict, style="dim")]
        return Group(*parts)


def step_table(rows: deque[Row]) -> Table:
    """The last steps, one row each."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, expand=True)
    for name, _, _ in COLUMNS:
        table.add_column(name, justify="right")
    for row in rows:
        style = "bold" if row is rows[-1] else ""
        table.add_row(*(_written(row, key, form) for _, key, form in COLUMNS), style=style)
    return table


def _written(row: Row, key: str, form: str) -> str:
    return form.format(row[key]) if key in row else ABSENT
