"""Which curves a report draws from a run's metrics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

from deploy.metrics import Row
from deploy.shares import Shares

SMOOTHED_PARTS = 20  # a smoothed curve averages over this part of the run

Values = list[float | None]  # None: a gap in the curve


@dataclass(frozen=True, slots=True)
class Chart:
    """One picture: curves over the learner's steps."""

    title: str
    note: str  # what is seen, and in which unit
    series: dict[str, str]  # key of the row -> name
    format: str = ""  # d3 format of the values
    smooth: bool = False  # noisy: draw the mean of the last steps over the faint values


CHARTS = (
    Chart(
        "Reward and success",
        "mean of the trained episodes",
        {"reward": "reward", "success": "success"},
        ".3f",
        True,
    ),
    Chart("Entropy", "of the policy, nats per token", {"entropy": "entropy"}, ".3f"),
    Chart(
        "Distance to the sampling policy",
        "nats per token: KL divergence, and mean |difference of logprobs|",
        {"kl": "KL", "behavior_gap": "logprob gap"},
        ".4f",
    ),
    Chart(
        "Lag",
        "weight versions between sampling and training",
        {"lag_mean": "mean", "lag_max": "max", "reused_lag_mean": "mean of reused groups"},
        ".2f",
    ),
    Chart("Gradient", "norm before clipping", {"grad_norm": "norm"}, ".3f"),
    Chart("Clipped tokens", "share whose probability ratio was clipped", {"clip_fraction": "clipped"}, ".2%"),
    Chart(
        "Throughput",
        "tokens a second",
        {"rollout_tokens_per_s": "sampled", "learner_tokens_per_s": "trained"},
        ",.0f",
        True,
    ),
    Chart("Weight sync", "milliseconds that generation stood still", {"sync_stall_ms": "stall"}, ".0f"),
)
TIME_NAMES = {
    "wait": "waiting for rollouts",
    "train": "training",
    "publish": "publishing weights",
    "rest": "rest",
}


def drawn(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Every chart the rows have numbers for, as plain data for the page: JSON, no NaN."""
    steps = [row["step"] for row in rows]
    charts = [_plain(chart, rows, steps) for chart in CHARTS]
    if rows:
        charts.insert(2, _time(rows, steps))
    return [chart for chart in charts if chart["series"]]


def moving_mean(values: Values, window: int) -> Values:
    """The mean of the last `window` values, gaps left out; a gap where there is nothing to average."""
    means: Values = []
    for end in range(1, len(values) + 1):
        seen = [value for value in values[max(0, end - window) : end] if value is not None]
        means.append(sum(seen) / len(seen) if seen else None)
    return means


def _plain(chart: Chart, rows: Sequence[Row], steps: list[float]) -> dict[str, Any]:
    window = max(1, len(rows) // SMOOTHED_PARTS)
    series = []
    for key, name in chart.series.items():
        values: Values = [row[key] if key in row and isfinite(row[key]) else None for row in rows]
        if any(value is not None for value in values):
            smoothed = moving_mean(values, window) if chart.smooth and window > 1 else None
            series.append({"name": name, "y": values, "smoothed": smoothed})
    note = chart.note + (f"; bold: mean of {window} steps" if chart.smooth and window > 1 else "")
    return _chart(chart.title, note, steps, series, chart.format, stacked=False)


def _time(rows: Sequence[Row], steps: list[float]) -> dict[str, Any]:
    shares = [Shares.of([row]) for row in rows]
    columns = {
        "train": [share.train for share in shares],
        "wait": [share.wait for share in shares],
        "publish": [share.publish for share in shares],
        "rest": [share.rest for share in shares],
    }
    series = [{"name": TIME_NAMES[key], "y": values, "smoothed": None} for key, values in columns.items()]
    return _chart("Where the learner's time went", "share of each step", steps, series, ".0%", stacked=True)


def _chart(
    title: str, note: str, steps: list[float], series: list[dict[str, Any]], form: str, stacked: bool
) -> dict[str, Any]:
    return {"title": title, "note": note, "x": steps, "series": series, "format": form, "stacked": stacked}
