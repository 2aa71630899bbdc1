"""docs/reference/cli.md: every command with its arguments and options, as the command line itself describes them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from inspect import cleandoc

import typer
from typer.core import TyperCommand, TyperGroup

from deploy.commands.markdown import GENERATED, code, link, prose, table

_INTRODUCTION = """\
Every command shows its section in the terminal: `manta COMMAND --help`. `manta --version` shows the version. A user's
mistake is one line on stderr and exit status 2; a run that ends on purpose (a guard, too many failures, a part that was
lost too often) exits with 1.

"""
_NOTE = re.compile(r"(.*?)(?:\s*\[((?:default|required|env var|[\d.]*<?=?x)[^\]]*)\])?", re.DOTALL)


def commands_page(manta: TyperGroup) -> str:
    """Return the page: an index, then a section for each command."""
    commands = {name: each for name, each in manta.commands.items() if isinstance(each, TyperCommand)}
    index = "".join(
        f"- {link(code(f'manta {name}'), f'manta {name}')}: {prose(_paragraphs(command)[0])}\n"
        for name, command in commands.items()
    )
    sections = "".join(_section(name, command) for name, command in commands.items())
    return f"# Commands\n\n{GENERATED}{_INTRODUCTION}{index}\n{sections}".rstrip() + "\n"


def _section(name: str, command: TyperCommand) -> str:
    context = typer.Context(command, info_name=f"manta {name}")
    usage = command.get_usage(context).removeprefix("Usage: ")
    text = f"## manta {name}\n\n" + "".join(_explained(command))
    text += f"Usage: {code(' '.join(usage.split()))}\n\n"
    rows: dict[str, list[tuple[str, str]]] = {"argument": [], "option": []}
    for parameter in command.params:
        if record := parameter.get_help_record(context):
            rows[parameter.param_type_name].append(_described(*record))
    return text + "".join(table((kind, "description"), each) for kind, each in rows.items() if each)


def _described(name: str, text: str) -> tuple[str, str]:
    """A row of a parameter: the help's two columns, with the note about default or range behind."""
    found = _NOTE.fullmatch(text)
    assert found is not None
    note = f" ({prose(found[2])})" if found[2] else ""
    return code(name), f"{prose(found[1])}{note}"


def _explained(command: TyperCommand) -> Iterator[str]:
    """The paragraphs of a command's help; its examples as one block of code."""
    examples = []
    for paragraph in _paragraphs(command):
        lines = [line for line in paragraph.splitlines() if line.rstrip(":") not in ("Example", "Examples")]
        if all(line.startswith("manta ") for line in lines):
            examples += lines
        else:
            yield f"{prose(paragraph)}\n\n"
    if examples:
        yield "".join(f"    {line}\n" for line in examples) + "\n"


def _paragraphs(command: TyperCommand) -> list[str]:
    return cleandoc(command.help or "").split("\n\n")
