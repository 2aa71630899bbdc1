"""The charts of a report, from a run's metrics."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

from deploy.report.bottleneck import Shares
from rollout.wire.metrics import Row

SMOOTHED_PARTS = 20  # a smoothed curve averages over this fraction of the run
MOST_NAMED = 24  # charts of named rewards at most; metrics.jsonl has all of them

Values = list[float | None]  # None: a gap in the curve


@dataclass(frozen=True, slots=True)
class Chart:
    """One chart: curves over the learner's steps."""

    title: str
    note: str  # the quantity and its unit
    series: dict[str, str]  # key of the row -> name
    format: str = ""  # d3 format of the values
    smooth: bool = False  # draw a moving mean over the faint values
    spread: dict[str, str] = field(default_factory=dict)  # key of a curve -> key of its standard deviation


CHARTS = (
    Chart(
        "Reward and success",
        "mean over trained episodes",
        {"reward": "reward", "success": "success"},
        ".3f",
        True,
        {"reward": "reward_std"},
    ),
    Chart(
        "Turns per episode",
        "trained episodes",
        {"turns_p50": "median", "turns_p95": "95th percentile", "turns_max": "max"},
        ".1f",
    ),
    Chart(
        "Sampled tokens per episode",
        "trained episodes",
        {
            "sampled_per_episode_p50": "median",
            "sampled_per_episode_p95": "95th percentile",
            "sampled_per_episode_max": "max",
        },
        ",.0f",
    ),
    Chart(
        "Episodes without advantage",
        "share of episodes without a learning signal, for example with equal rewards in a group",
        {"zero_advantage_fraction": "share"},
        ".1%",
    ),
    Chart("Entropy", "policy entropy, nats per token", {"entropy": "entropy"}, ".3f"),
    Chart(
        "Distance to the sampling policy",
        "nats per token: KL divergence and mean absolute difference of logprobs",
        {"kl": "KL", "behavior_gap": "logprob gap"},
        ".4f",
    ),
    Chart(
        "Distance to the teacher",
        "nats per token: estimate of KL(policy, teacher)",
        {"distill/kl": "KL"},
        ".3f",
    ),
    Chart(
        "Lag",
        "weight versions between sampling and training",
        {"lag_mean": "mean", "lag_max": "max", "reused_lag_mean": "mean of reused groups"},
        ".2f",
    ),
    Chart("Learning rate", "of the policy", {"learning_rate": "rate"}, ".3~g"),
    Chart("Gradient", "norm before clipping", {"grad_norm": "norm"}, ".3f"),
    Chart(
        "Clipped tokens",
        "share of tokens with a clipped probability ratio",
        {"clip_fraction": "clipped"},
        ".2%",
    ),
    Chart(
        "Throughput",
        "tokens per second",
        {"rollout_tokens_per_s": "sampled", "learner_tokens_per_s": "processed by the learner"},
        ",.0f",
        True,
    ),
    Chart("Weight sync", "pause of generation, milliseconds", {"sync_stall_ms": "stall"}, ".0f"),
)
TIME_NAMES = {
    "wait": "waiting for rollouts",
    "train": "training",
    "publish": "publishing weights",
    "rest": "rest",
}


def drawn(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Every chart with values in the rows, as plain JSON data without NaN."""
    steps = [row["step"] for row in rows]
    first, *others = (_plain(chart, rows, steps) for chart in CHARTS)
    further = (*costs(rows), *environments(rows), *named_rewards(rows))
    charts = [first, *(_plain(chart, rows, steps) for chart in further), *others]
    if rows:
        charts.append(_time(rows, steps))
    return [chart for chart in charts if chart["series"]]


def evaluated(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Charts of the evaluations during training: one for shares, one for rewards. None of the first and last alone."""
    if len(rows) <= 2:
        return []
    steps = [row["step"] for row in rows]
    keys = sorted({key for row in rows for key in row if key.startswith("eval_")})
    rewards = [key for key in keys if key.endswith("_reward")]
    parts = {"Evaluation": [key for key in keys if key not in rewards], "Evaluation reward": rewards}
    charts = [
        Chart(title, "evaluated tasks, by version", {key: key.removeprefix("eval_") for key in own}, ".3f")
        for title, own in parts.items()
    ]
    return [drawn for chart in charts if (drawn := _plain(chart, rows, steps))["series"]]


def named_rewards(rows: Sequence[Row]) -> list[Chart]:
    """A chart for each named reward of the environment, by name; at most MOST_NAMED."""
    keys = {key for row in rows for key in row if key.startswith("rewards/") and key.endswith("/mean")}
    return [
        Chart(
            f"Reward: {key.removeprefix('rewards/').removesuffix('/mean')}",
            "mean over trained episodes",
            {key: "mean"},
            ".3f",
            True,
            {key: key.removesuffix("/mean") + "/std"},
        )
        for key in sorted(keys)[:MOST_NAMED]
    ]


def costs(rows: Sequence[Row]) -> list[Chart]:
    """A chart for each cost, with its limit where a constraint sets one; and one of the constraints' multipliers."""
    keys = {key for row in rows for key in row}
    names = sorted(key[6:-5] for key in keys if key.startswith("costs/") and key.endswith("/mean"))
    found = [
        Chart(
            f"Cost: {name}",
            "mean over trained episodes",
            {f"costs/{name}/mean": "mean", f"constraint/{name}/limit": "limit"},
            ".3f",
            True,
            {f"costs/{name}/mean": f"costs/{name}/std"},
        )
        for name in names[:MOST_NAMED]
    ]
    prices = {f"constraint/{name}/multiplier": name for name in names}
    return [*found, Chart("Multipliers of constraints", "reward per unit of the cost", prices, ".3f")]


def environments(rows: Sequence[Row]) -> list[Chart]:
    """Charts of reward and success with a curve for each environment of a run with several."""
    charts = []
    for metric in ("reward", "success"):
        keys = {key for row in rows for key in row if re.fullmatch(f"env/[^/]+/{metric}", key)}
        series = {key: key.split("/")[1] for key in sorted(keys)}
        title = f"{metric.capitalize()} of each environment"
        charts.append(Chart(title, "mean over trained episodes", series, ".3f", True))
    return charts


def moving_mean(values: Values, window: int) -> Values:
    """Mean of the last `window` values without gaps; a gap if all of them are gaps."""
    means: Values = []
    for end in range(1, len(values) + 1):
        seen = [value for value in values[max(0, end - window) : end] if value is not None]
        means.append(sum(seen) / len(seen) if seen else None)
    return means


def _plain(chart: Chart, rows: Sequence[Row], steps: list[float]) -> dict[str, Any]:
    window = max(1, len(rows) // SMOOTHED_PARTS)
    series = []
    shaded = False
    for key, name in chart.series.items():
        values = _column(rows, key)
        if any(value is not None for value in values):
            smoothed = moving_mean(values, window) if chart.smooth and window > 1 else None
            band = _band(smoothed or values, moving_mean(_column(rows, chart.spread.get(key, "")), window))
            shaded |= band is not None
            series.append({"name": name, "y": values, "smoothed": smoothed, "band": band})
    note = chart.note + (f"; bold: mean over {window} steps" if chart.smooth and window > 1 else "")
    note += "; shaded: one standard deviation over episodes" if shaded else ""
    return _chart(chart.title, note, steps, series, chart.format, stacked=False)


def _column(rows: Sequence[Row], key: str) -> Values:
    return [row[key] if key in row and isfinite(row[key]) else None for row in rows]


def _band(values: Values, deviations: Values) -> tuple[Values, Values] | None:
    """The lower and upper ends of a curve's shaded band; None if no step has one."""
    if not any(deviation is not None for deviation in deviations):
        return None
    both = [
        None if value is None or deviation is None else (value - deviation, value + deviation)
        for value, deviation in zip(values, deviations, strict=True)
    ]
    return [ends and ends[0] for ends in both], [ends and ends[1] for ends in both]


def _time(rows: Sequence[Row], steps: list[float]) -> dict[str, Any]:
    shares = [Shares.of([row]) for row in rows]
    columns = {
        "train": [share.train for share in shares],
        "wait": [share.wait for share in shares],
        "publish": [share.publish for share in shares],
        "rest": [share.rest for share in shares],
    }
    series = [
        {"name": TIME_NAMES[key], "y": values, "smoothed": None, "band": None}
        for key, values in columns.items()
    ]
    return _chart("Time of the learner", "share of each step", steps, series, ".0%", stacked=True)


def _chart(
    title: str, note: str, steps: list[float], series: list[dict[str, Any]], form: str, stacked: bool
) -> dict[str, Any]:
    return {"title": title, "note": note, "x": steps, "series": series, "format": form, "stacked": stacked}
