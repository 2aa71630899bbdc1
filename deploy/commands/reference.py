"""`manta docs`: the reference pages of the documentation, written from the code, and whether they are current."""

from __future__ import annotations

from pathlib import Path

from typer.core import TyperGroup

from deploy.commands.reference_commands import commands_page
from deploy.commands.reference_metrics import metrics_page
from deploy.commands.reference_options import configuration_page


def pages(manta: TyperGroup) -> dict[str, str]:
    """Return the pages by file name. manta: the command line, with all of its commands."""
    return {
        "configuration.md": configuration_page(),
        "metrics.md": metrics_page(),
        "cli.md": commands_page(manta),
    }


def write_pages(manta: TyperGroup, folder: Path) -> list[Path]:
    """Write all pages into the folder, which is created if absent; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, text in pages(manta).items():
        (folder / name).write_text(text, encoding="utf-8")
        written.append(folder / name)
    return written


def stale_pages(manta: TyperGroup, folder: Path) -> list[Path]:
    """Return the pages of the folder that are missing or differ from what the code says now."""
    current = {folder / name: text for name, text in pages(manta).items()}
    return [
        path
        for path, text in current.items()
        if not path.is_file() or path.read_text(encoding="utf-8") != text
    ]
