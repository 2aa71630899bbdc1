"""All output to the terminal: text of environments, models, files and errors is printed literally.

Such text is never interpreted as markup, emoji codes or terminal commands: `[/path]` stays unchanged, and control
characters are shown as escapes. `rich` is imported here alone, and no other module prints; tests enforce both.
"""

from __future__ import annotations

import codecs
import io
import locale
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TypeAlias

from rich import box
from rich.console import Console as Console
from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichBars
from rich.table import Table
from rich.text import Text

Cell: TypeAlias = str | tuple[str, str]  # a text, or a text and its style

# Characters that act on a terminal or mislead a reader: C0 and C1 controls except newline and tab, marks of text
# direction, invisible characters, line separators, lone surrogates, tags.
_OBEYED = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def visible(text: str) -> str:
    """The text with its control characters written as escapes; newlines and tabs stay."""
    return _OBEYED.sub(lambda found: _escape(found[0]), text.replace("\r\n", "\n"))


def one_line(text: str) -> str:
    """`visible` on one line: line breaks and tabs become a space, so that foreign text starts no line of its own."""
    return re.sub(r"[ ]*[\n\t][ \n\t]*", " ", visible(text).strip())


def without_colours(text: str) -> str:
    """The text of another program's log without its colours."""
    return _COLOUR.sub("", text)


def use_utf8() -> None:
    """Restart this command in Python's UTF-8 mode if the locale or PYTHONUTF8=0 sets another encoding.

    Arguments, paths, files and the input of other processes and libraries are UTF-8 then. Output to the terminal keeps
    the terminal's encoding.
    """
    used = {sys.getfilesystemencoding(), locale.getpreferredencoding(False)}
    if {codecs.lookup(each).name for each in used} == {"utf-8"} or os.environ.get("PYTHONUTF8") == "1":
        return
    os.environ.setdefault("PYTHONIOENCODING", f"{sys.stdout.encoding}:backslashreplace")
    os.environ["PYTHONUTF8"] = "1"
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def standard_streams() -> None:
    """Write characters that the encoding of stdout and stderr lacks (ASCII locales) as escapes instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if reconfigure := getattr(stream, "reconfigure", None):  # streams of tests and notebooks lack it
            reconfigure(errors="backslashreplace")


def errors() -> Console:
    """The console of stderr."""
    return Console(stderr=True, markup=False, emoji=False, highlight=False)


def output() -> Console:
    """The console of stdout."""
    return Console(markup=False, emoji=False, highlight=False)


def silent() -> Console:
    """A console that shows nothing."""
    return Console(file=io.StringIO())


def write(console: Console, text: str, style: str = "", end: str = "\n", wrap: bool = False) -> None:
    """Print a text in one style. Lines are not wrapped to the terminal's width unless `wrap` is set."""
    console.print(_plain(text, style), end=end, highlight=False, soft_wrap=not wrap)


def write_table(console: Console, columns: Sequence[str], rows: Iterable[Sequence[Cell]]) -> None:
    """Print a table; long cells are folded, not cut."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(_plain(column), overflow="fold")
    for row in rows:
        table.add_row(*map(_cell, row))
    console.print(table)


def busy(console: Console, text: str) -> AbstractContextManager[object]:
    """Show a status line while the context is open; nothing without a terminal."""
    return console.status(_plain(text))


class Bars:
    """Progress bars, each with a name, a count and a few numbers beside it."""

    def __init__(self, console: Console) -> None:
        self.shown = RichBars(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[beside]}", markup=False),
            console=console,
            expand=True,
        )

    def add(self, name: str, total: int, done: int = 0) -> int:
        """Add a bar of `total` units."""
        return self.shown.add_task(one_line(name), total=total, completed=done, beside="")

    def move(self, bar: int, done: int, beside: str = "") -> None:
        """Set a bar to `done` units, with the text beside it."""
        self.shown.update(TaskID(bar), completed=done, beside=one_line(beside))


@dataclass(frozen=True, slots=True)
class Numbers:
    """A table of right-aligned numbers with a highlighted last row."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


Part: TypeAlias = Cell | Bars | Numbers


class LiveDisplay:
    """A live part of the terminal: texts, bars, numbers."""

    def __init__(self, console: Console, draw: Callable[[], Sequence[Part]]) -> None:
        self._draw = draw
        self._live = Live(console=console, get_renderable=self._render)

    def start(self) -> None:
        """Start drawing."""
        self._live.start()

    def stop(self) -> None:
        """Draw a last time and stop; the output stays."""
        self._live.stop()

    def _render(self) -> Group:
        return Group(*(_part(part) for part in self._draw()))


def _part(part: Part) -> RenderableType:
    if isinstance(part, Bars):
        return part.shown
    if not isinstance(part, Numbers):
        return _cell(part)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, expand=True)
    for column in part.columns:
        table.add_column(_plain(column), justify="right")
    for number, row in enumerate(part.rows, 1):
        table.add_row(*map(_plain, row), style="bold" if number == len(part.rows) else "")
    return table


def _cell(cell: Cell) -> Text:
    return _plain(cell) if isinstance(cell, str) else _plain(*cell)


def _plain(text: str, style: str = "") -> Text:
    return Text(visible(text), style)


def _escape(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")
