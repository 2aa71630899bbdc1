"""A run that has made all its steps: what it came to, told without starting anything."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from deploy.config import run_folder
from deploy.config.config import RunConfig
from deploy.config.config_errors import ConfigError
from deploy.report.console import Console, write
from deploy.report.evaluation import WHEN, said

SUMMARY = "summary.json"


def told_finished(config: RunConfig, folder: Path, console: Console) -> bool:
    """Whether the run has nothing left to do; then its outcome is printed, and how it could go on."""
    summary = _stored(folder)
    reports = [folder / "policies" / name for name in config.policies] or [folder]
    written = all((each / "report.html").is_file() for each in reports)
    if summary is None or summary.get("steps") != config.steps or not written:
        return False
    more = f"manta train --resume {shlex.quote(str(folder))} steps={2 * config.steps}"
    write(console, f"finished already: {config.steps} of {config.steps} steps are made; to go on: {more}")
    print_outcome(summary, folder, console)
    return True


def print_outcome(summary: dict[str, Any], folder: Path, console: Console) -> None:
    """What a run came to, in all, of each of several environments and on each suite, and where its report lies.

    Of several policies, one after the other.
    """
    for name, own in summary.get("policies", {}).items():
        write(console, f"policy {name}")
        print_outcome(own, folder / "policies" / name, console)
    if "policies" in summary:
        return
    parts = summary.get("environments", {}) | summary.get("suites", {})
    for of, figures in {"": summary, **parts}.items():
        for when in WHEN:
            name = "reward" if figures.get(f"success_{when}") is None else "success"
            if (value := figures.get(f"{name}_{when}")) is not None:
                named = f"{of}: {name} {when:6}" if of else f"{name} {when:6}"
                write(console, said(named, value, figures[f"{name}_{when}_interval"]))
    write(console, f"report         {folder / 'report.html'}")


def _stored(folder: Path) -> dict[str, Any] | None:
    """The summary of a run that ended once; None where there is none that can be read, and the run goes on."""
    if not (folder / SUMMARY).is_file():
        return None
    try:
        summary = run_folder.read_json(folder / SUMMARY)
    except ConfigError:
        return None
    return summary if isinstance(summary, dict) else None
