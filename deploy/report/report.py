"""RUN/report.html: the report of a run in one self-contained file, readable offline.

It includes the numbers, the charts' code (plotly.js) and the episodes. It is made from the run's folder alone, so it
can be written again at any time.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from math import exp
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from plotly.offline import get_plotlyjs

from deploy.report.bottleneck import Shares
from deploy.report.charts import drawn, evaluated
from deploy.report.console import visible
from deploy.report.episodes import chosen_episodes
from deploy.report.evaluation import WHEN, stored_figures
from deploy.report.metrics import read_metrics
from rollout.wire.metrics import Row
from rollout.wire.whole_file import replace_file

REPORT_FILE = "report.html"

Summary = dict[str, Any]


def write_report(run_folder: Path) -> Path:
    """Write the report of a run, finished or not, and return its path. ConfigError if the folder is not a run's.

    It reads config.json, metrics.jsonl, summary.json (absent in a running run), groups/ and evaluations/.
    """
    config = _config(run_folder)
    stored = run_folder / "summary.json"
    summary: Summary = json.loads(stored.read_text(encoding="utf-8")) if stored.is_file() else {}
    measured = summary or stored_figures(run_folder)
    task = "held-out task" if measured.get("held_out", True) else "evaluation task"
    rows = read_metrics(run_folder)
    page = _templates().get_template("report.html.j2")
    text = page.render(
        title=config.get("name", "run"),
        run=run_folder.resolve().name,
        finished=bool(summary),
        outcomes=outcomes(measured, task),
        facts=facts(rows, summary),
        verdict=Shares.of(rows).verdict if rows else "",
        phases=phases(summary),
        ledger=summary.get("ledger", {}),
        charts=evaluated(read_metrics(run_folder / "evaluations")) + drawn(rows),
        episodes=chosen_episodes(run_folder, task),
        config=json.dumps(config, indent=2, ensure_ascii=False),
        plotly=get_plotlyjs(),
    )
    path = run_folder / REPORT_FILE
    replace_file(path, text.encode(errors="backslashreplace"))
    return path


def _config(run_folder: Path) -> dict[str, Any]:
    """The stored configuration, not validated: this version need not be able to run it."""
    path = run_folder / "config.json"
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(stored, dict):
            return stored
        fault = f"{path}: broken file (it has no table of options)"
    except (FileNotFoundError, NotADirectoryError):
        fault = f"{run_folder} is not a run folder: it has no {path.name}"
    except ValueError as error:
        fault = f"{path}: broken file ({error})"
    from deploy.config.config_errors import ConfigError  # imported here, since it imports torch

    raise ConfigError(fault)


def outcomes(summary: Summary, task: str) -> list[dict[str, Any]]:
    """Cards for success (if the environment gives verdicts), reward and costs, before and after, with intervals.

    Those of the run are followed by those of each of several environments, and of each suite.
    """
    cards = _cards(summary, f"{task}s")
    parts = summary.get("environments", {}) | summary.get("suites", {})
    for name, figures in parts.items():
        cards += _cards(figures, name)
    return cards


def _cards(summary: Summary, tasks: str) -> list[dict[str, Any]]:
    cards = []
    costs = dict.fromkeys(
        key.rsplit("_", 2)[0] for key in summary if key.startswith("cost_") and key.endswith("_interval")
    )
    for name, form in (("success", "{:.1%}"), ("reward", "{:.3g}"), *((cost, "{:.3g}") for cost in costs)):
        measured = [when for when in WHEN if summary.get(f"{name}_{when}_interval") is not None]
        if not measured:
            continue
        intervals = [summary[f"{name}_{when}_interval"] for when in measured]
        least, most = (0.0, 1.0) if name == "success" else _scale(intervals)

        def placed(value: float, least: float = least, most: float = most) -> str:
            return f"{100 * (value - least) / (most - least):.2f}"

        bars = [
            {
                "when": when,
                "said": form.format(value := summary[f"{name}_{when}"]),
                "low": form.format(interval[0]).rstrip("%"),
                "high": form.format(interval[1]).rstrip("%"),
                "left": placed(interval[0]),
                "right": placed(interval[1]),
                "dot": placed(value),
            }
            for when, interval in zip(measured, intervals, strict=True)
        ]
        note = f"bars: 95% intervals, scale from {form.format(least)} to {form.format(most)}"
        title = name.capitalize().replace("_", " ", 1)
        cards.append({"title": f"{title} on {tasks}", "bars": bars, "note": note})
    return cards


def _scale(intervals: Sequence[Sequence[float]]) -> tuple[float, float]:
    """The two different ends of an axis with all intervals and zero."""
    least, most = min(0.0, *(low for low, _ in intervals)), max(0.0, *(high for _, high in intervals))
    return least, most if most > least else least + 1.0


def facts(rows: Sequence[Row], summary: Summary) -> list[tuple[str, str]]:
    """The key figures: name and value."""
    shown = [("learner steps", f"{len(rows):,}")]
    if summary:
        # In older runs it is called tokens_trained; prompts are included.
        processed = summary["tokens_processed" if "tokens_processed" in summary else "tokens_trained"]
        shown += [
            ("wall clock", clock(sum(summary["seconds"].values()))),
            ("tokens generated", f"{summary['tokens_generated']:,}"),
            ("tokens processed by the learner", f"{processed:,}"),
            ("seed", f"{summary['seed']}"),
        ]
    if rows:
        shown.append(("largest lag", f"{max(row['lag_max'] for row in rows):.0f}"))
    return shown


def phases(summary: Summary) -> list[dict[str, Any]]:
    """The wall clock by phase: name, duration as text, share of the whole 0..1."""
    seconds: dict[str, float] = summary.get("seconds", {})
    total = sum(seconds.values())
    return [
        {"name": name.replace("_", " "), "clock": clock(spent), "share": spent / total}
        for name, spent in seconds.items()
        if total > 0
    ]


def clock(seconds: float) -> str:
    """A duration as text: 8.2 s, 3 min 05 s, 2 h 07 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def _templates() -> Environment:
    # Text of environments and models is never markup: autoescape escapes it, and control characters are made visible.
    templates = Environment(
        loader=PackageLoader("deploy.report"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: visible(value) if type(value) is str else value,  # Markup is ours
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # 1 - probability of a token, 0 (certain) to 1: the depth of its shading.
    templates.filters["uncertainty"] = lambda logprob: f"{1 - exp(min(0.0, logprob)):.3f}"
    return templates


if __name__ == "__main__":
    os.nice(10)
    write_report(Path(sys.argv[1]))
