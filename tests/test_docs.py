"""The pages say what is there: files of the tree, targets of links, messages of the code, and examples that work."""

from __future__ import annotations

import ast
import re
import shlex
from functools import lru_cache
from pathlib import Path

import pytest
import typer

from deploy.cli import app
from deploy.config.load import load_config
from envs.checks.check import check

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted(DOCS.rglob("*.md"))]
PACKAGES = ("envs", "rollout", "learner", "deploy")
GAP = "..."  # in a quoted message: what differs from case to case


def _text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def _anchors(page: Path) -> set[str]:
    """The ids of a page's headings, as GitHub and the site both make them."""
    headings = re.findall(r"^#+ (.+)$", _text(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    prose = re.sub(r"^```.*?^```", "", _text(page), flags=re.DOTALL | re.MULTILINE)
    links = re.findall(r"\]\(([^)\s]+)\)", prose) + re.findall(r'src="([^"]+)"', prose)
    for link in links:
        path, _, anchor = link.partition("#")
        if re.match(r"\w+:", link):
            continue
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in _anchors(target), link


def test_the_readme_is_short() -> None:
    assert len(_text(ROOT / "README.md").splitlines()) <= 150


def test_the_tree_names_the_files_there_are() -> None:
    room, named = "", set()
    for line in _text(DOCS / "tree.md").splitlines():
        if heading := re.match(r"## `([\w/]+)/`", line):
            room = heading[1]
        elif row := re.match(r"\| (`[^|]+) \|", line):
            named |= {f"{room}/{file}" for file in re.findall(r"`(\w+\.py)`", row[1])} if room else set()
    there = {
        path.relative_to(ROOT).as_posix() for package in PACKAGES for path in (ROOT / package).rglob("*.py")
    }
    assert named == {path for path in there if not path.endswith("__init__.py")}


def _pieces(node: ast.AST) -> str | None:
    """A literal text with GAP where a value is put in; None for any other expression."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(_pieces(part) or GAP for part in node.values)
    return None


@lru_cache
def _literals() -> tuple[str, ...]:
    """Every text that the code can say, longest ones included, and the recipe's messages of make."""
    sources = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    trees = [ast.parse(_text(path)) for path in sources]
    found = [piece for tree in trees for node in ast.walk(tree) if (piece := _pieces(node))]
    return (*found, _text(ROOT / "Makefile"))


def _messages() -> list[str]:
    """The messages quoted by the troubleshooting page: code that stands first in a row of a table."""
    rows = re.findall(r"^\| (`.+?) \|", _text(DOCS / "troubleshooting.md"), re.MULTILINE)
    return [quoted for row in rows for quoted in re.findall(r"`([^`]+)`", row)]


FROM_ELSEWHERE = {"operator torchvision::nms does not exist", "No module named 'torchvision'"}
# Said with a name that is put in where the page has an example, or put together of several texts.
PUT_TOGETHER = {
    "ALARM: step ...: entropy is ... (entropy below 0.01 for 10 steps)": (
        "ALARM: ",
        "step ...: ... is ... (... for ... steps)",
    ),
    "note: off-policy samples (...) are treated as on-policy: ...": (
        "note: ...",
        "off-policy samples (...) are treated as on-policy: ",
    ),
}


def _said(message: str) -> bool:
    """Whether the pieces of a message stand in one text of the code, in this order."""
    pattern = re.compile(".*".join(re.escape(piece) for piece in message.split(GAP)), re.DOTALL)
    return any(pattern.search(literal) for literal in _literals())


@pytest.mark.parametrize("message", _messages())
def test_a_quoted_message_is_one_that_the_code_says(message: str) -> None:
    if message not in FROM_ELSEWHERE:
        assert all(_said(part) for part in PUT_TOGETHER.get(message, (message,))), message


def _commands() -> list[str]:
    """Every line of a page's blocks that calls the command."""
    found = [line for page in PAGES for line in re.findall(r"^ {4}(manta .+)$", _text(page), re.MULTILINE)]
    return sorted({" ".join(shlex.split(line, comments=True)) for line in found})


@pytest.mark.parametrize("line", _commands())
def test_a_command_of_a_page_is_one_that_there_is(line: str) -> None:
    _, name, *arguments = line.split(" ")
    command = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
    said = command.make_context(name, arguments).params
    recipe, overrides = said.get("recipe") or "", said.get("overrides") or []
    if recipe.islower() and "=" not in recipe and not recipe.endswith(".toml"):
        load_config(recipe, overrides)


def test_the_tutorials_environment_is_sound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = _text(DOCS / "tutorials" / "first_environment.md")
    source = next(
        code for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "class Guess" in code
    )
    (tmp_path / "guess.py").write_text(source, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    assert check("guess:Guess") == []
    assert check("guess:Guess", {"most": 5}) == []
