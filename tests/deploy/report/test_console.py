"""Foreign text on a real pseudo-terminal: printed as it is, obeyed by nothing."""

from __future__ import annotations

import ast
import os
import pty
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from deploy.commands.doctor import Diagnosis, Severity, show
from deploy.commands.envs_command import show_findings
from deploy.report.console import busy, one_line, visible, write, write_table
from deploy.report.progress import Progress
from envs.checks.findings import Issue
from tests.test_architecture import PACKAGES, ROOT, files

HOSTILE = (
    "[/pytorch/c10/core/x.cpp:88] [bold]m:factory [link=x] \x1b[2J\x1b]0;title\x07 "
    "a\rb \u202etxt \x9b1m \ud800 é 🎲 :factory:"
)
SHOWN = (
    "[/pytorch/c10/core/x.cpp:88]",
    "[bold]m:factory",
    "[link=x]",
    r"\x1b[2J\x1b]0;title\x07",
    r"a\rb",
    r"\u202etxt",
    r"\x9b1m",
    r"\ud800",
    "é 🎲 :factory:",
)
COLOUR = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")  # what the display itself says to the terminal


def on_terminal(draw: Callable[[Console], object]) -> str:
    """What a terminal of 400 columns is told by `draw`."""
    master, slave = pty.openpty()
    read: list[bytes] = []

    def drain() -> None:
        try:
            while chunk := os.read(master, 65536):
                read.append(chunk)
        except OSError:  # how Linux tells that the other end is closed
            pass

    reader = threading.Thread(target=drain)
    reader.start()
    with open(slave, "w", encoding="utf-8") as terminal:
        console = Console(file=terminal, width=400, height=40)  # with markup: the door is what keeps it out
        assert console.is_terminal
        draw(console)
    reader.join(10)
    os.close(master)
    return b"".join(read).decode()


def live(console: Console) -> None:
    with Progress(3, HOSTILE, console) as progress, progress.phase(HOSTILE, 2) as phase:
        phase.advance(1, loss=2.0)
        progress.begin_steps()
        progress.update(1, {"reward": 0.5, "wait_s": 1.0, "train_s": 1.0, "publish_s": 0.0, "step_s": 2.0})
        progress.say(f"rollout-0 was lost: {HOSTILE}")


def waiting(console: Console) -> None:
    with busy(console, HOSTILE):
        pass


@pytest.mark.parametrize(
    "draw",
    [
        pytest.param(live, id="live"),
        pytest.param(waiting, id="waiting"),
        pytest.param(lambda console: write(console, HOSTILE, "red"), id="line"),
        pytest.param(
            lambda console: write_table(console, [HOSTILE], [[HOSTILE], [(HOSTILE, "red")]]), id="table"
        ),
        pytest.param(
            lambda console: show([Diagnosis(HOSTILE, HOSTILE, Severity.BAD, HOSTILE)], console), id="doctor"
        ),
        pytest.param(
            lambda console: show_findings(HOSTILE, [Issue("raises", HOSTILE, HOSTILE)], console),
            id="check-env",
        ),
    ],
)
def test_hostile_text_is_shown_and_not_obeyed(draw: Callable[[Console], object]) -> None:
    told = on_terminal(draw)
    assert "title\x07" not in told and "\x1b[2J" not in told and "\u202e" not in told and "🏭" not in told
    shown = COLOUR.sub("", told)
    for text in SHOWN:
        assert text in shown


def test_a_line_that_stays_is_above_the_live_display() -> None:
    told = COLOUR.sub("", on_terminal(live))
    assert "rollout-0 was lost: [/pytorch/c10/core/x.cpp:88]" in told


@given(st.text())
def test_visible_text_has_nothing_that_a_terminal_obeys(text: str) -> None:
    shown = visible(text)
    assert all(character.isprintable() or character in "\n\t" or ord(character) > 0x9F for character in shown)
    shown.encode()  # no lone surrogate
    assert visible(shown) == shown
    assert not {"\n", "\t", "\r"} & set(one_line(text))


@pytest.mark.parametrize("arguments", [["check-env", "[/x]\x1b[2J:factory:"], ["--[/x]\x1b[2J"]])
def test_the_command_shows_what_it_was_told_as_it_is(arguments: list[str], tmp_path: Path) -> None:
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "deploy.cli", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TERM": "xterm"}
    done = subprocess.run(command, stdin=slave, stdout=slave, stderr=slave, cwd=tmp_path, env=environment)
    os.close(slave)
    told = COLOUR.sub("", os.read(master, 65536).decode())
    os.close(master)
    assert done.returncode == 2
    assert told.count("manta: ") == 1 and told.partition("manta: ")[2].count("\n") == 1
    assert visible(arguments[-1]).split("\n")[0] in told and "🏭" not in told


def prints(source: str) -> list[str]:
    """Calls in a file that print, or fill what is printed, past the door."""
    past = re.compile(
        r"(.*\.)?(print|add_row|add_column|add_task|from_markup)|typer\.s?echo|(.*\.)?console\.\w+|sys\.std(out|err)\.write"
    )
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return [f"line {call.lineno}: {name}" for call in calls if past.fullmatch(name := ast.unparse(call.func))]


DOOR = "deploy/report/console.py"
# Children whose stdout or stderr is a protocol or a log, not a terminal of ours.
CHILDREN = ("envs/hosting/fork_server.py", "rollout/external/program.py")


def test_nothing_prints_past_the_door() -> None:
    sources = {*files(*PACKAGES), "tests/bench/__main__.py", "tests/faults/__main__.py"}
    found = {path: prints((ROOT / path).read_text(encoding="utf-8")) for path in sources - {DOOR, *CHILDREN}}
    assert {path: calls for path, calls in found.items() if calls} == {}


@pytest.mark.parametrize(
    "call", ["print(x)", "console.print(x)", "table.add_row(x)", "sys.stdout.write(x)", "typer.echo(x)"]
)
def test_a_print_past_the_door_is_seen(call: str) -> None:
    assert prints(f"def f():\n    {call}") == [f"line 2: {call.partition('(')[0]}"]
