"""Stored episodes as text a person reads, and libraries' output kept out of it."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

from rich.console import Console

from deploy.report.transcripts import show_transcripts
from tests.deploy.report.test_episodes import episode, store


def test_the_first_episodes_are_shown_turn_by_turn(tmp_path: Path) -> None:
    store(tmp_path, episode([0, 1], success=True, seed=7), episode([0], success=None, seed=8, group_id=1))
    out = io.StringIO()
    show_transcripts(Console(file=out, width=80), tmp_path, 1)
    assert out.getvalue().splitlines() == [
        "",
        "seed 7: reward 1.000, success, 2 turns, terminated",
        *["      user  SF", "            FG", " assistant  ab", "  reward 0.000"],
        *["      user  SF", "            FG", " assistant  ab", "  reward 1.000"],
    ]
    show_transcripts(Console(file=out, width=80), tmp_path, 5)
    assert "seed 8: reward 0.000, 1 turn, terminated" in out.getvalue()


def test_output_of_children_and_of_this_process_goes_to_the_file_and_comes_back(tmp_path: Path) -> None:
    code = """
import os, sys
from pathlib import Path
from deploy.run.quiet import output_kept_in
print("before")
with output_kept_in(Path("log")):
    print("python"); print("error", file=sys.stderr); os.system("echo child")
print("after")
"""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        encoding="utf-8",
        check=True,
    )
    assert (done.stdout, done.stderr) == ("before\nafter\n", "")
    assert sorted((tmp_path / "log").read_text(encoding="utf-8").split()) == ["child", "error", "python"]
