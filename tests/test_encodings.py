"""Text has one encoding, UTF-8, whatever the locale: every file and pipe says so, and the command sees to the rest."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted(
    file for package in ("envs", "rollout", "learner", "deploy") for file in (ROOT / package).rglob("*.py")
)
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def unstated(source: str) -> Iterator[str]:
    """Calls that read, write or pipe text without naming its encoding; ruff's rule sees only some receivers."""
    for call in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)):
        given = {each.arg: each.value for each in call.keywords}
        name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        text = name in ("read_text", "write_text") or bool({"text", "universal_newlines"} & set(given))
        if name in ("open", "fdopen") and ast.unparse(call.func) != "os.open":
            modes = [each.value for each in [*call.args, *given.values()] if isinstance(each, ast.Constant)]
            text = "encoding" not in given and any(mode in ("r", "w", "a", "x", "a+", "r+") for mode in modes)
        if text and "encoding" not in given:
            yield f"line {call.lineno}: {ast.unparse(call.func)}"


@pytest.mark.parametrize(
    "call", ["path.read_text()", "path.write_text(x)", "path.open('a')", "open(x, 'w')", "run(x, text=True)"]
)
def test_a_text_of_no_stated_encoding_is_seen(call: str) -> None:
    assert list(unstated(call)) and not list(unstated(f"{call[:-1]}, encoding='utf-8')".replace("(,", "(")))


def test_every_text_states_its_encoding() -> None:
    found = {str(file): list(unstated(file.read_text(encoding="utf-8"))) for file in SOURCES}
    assert {file: calls for file, calls in found.items() if calls} == {}


def test_the_command_speaks_utf8_under_an_ascii_locale(tmp_path: Path) -> None:
    recipe = tmp_path / "künstlich.toml"
    recipe.write_text("# café\nextends = 'scratch'\n'näme' = 1\n[env]\nid = 'arithmetic'\n", encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "deploy.cli", "train", os.fsencode(recipe), "seed=ß"],
        cwd=ROOT,
        env=os.environ | ASCII,
        capture_output=True,
        timeout=120,
    )
    said = done.stderr.decode("ascii")  # what the terminal has not is written as an escape
    assert done.returncode == 2 and said.count("\n") == 1
    assert r"unknown option n\xe4me" in said and r"seed: " in said and r"\xdf" in said
