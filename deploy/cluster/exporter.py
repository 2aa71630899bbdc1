"""Metrics of a run through Ray's own exporter: Prometheus reads `ray_manta_NAME{run="..."}` from a cluster's nodes.

The numbers are those of metrics.jsonl, set once a step by the driver. deploy/monitoring/ has a dashboard of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray.util.metrics import Gauge

from deploy.config.declared_metrics import EVALUATIONS, METRICS
from deploy.config.evaluation import prefix

PREFIX = "manta_"
_ABOUT = {metric.name: metric.about for metric in (*METRICS, *EVALUATIONS.metrics)}


class RayMetrics:
    """A tracker (deploy/config/trackers.py) whose rows become gauges of the node that the driver runs on.

    Exported are metrics whose names Prometheus allows: not those of single environments, which have a slash, nor of
    suites whose names have a dash.
    """

    kind = "Ray's exporter"

    def run(self) -> RayMetrics:
        """Itself, as settings of a tracker make theirs."""
        return self

    def __init__(self) -> None:
        self._gauges: dict[str, Gauge] = {}
        self._values: dict[str, float] = {}
        self._tags: dict[str, str] = {}

    def on_run_start(self, config: dict[str, Any], folder: Path) -> None:
        self._tags = {"run": folder.name}
        self._set({"steps": float(config["steps"])})

    def on_step(self, row: Mapping[str, float]) -> None:
        self._set(row)

    def on_eval(self, name: str, row: dict[str, Any]) -> None:
        suite, _, _ = name.rpartition("/")
        said = {"reward": row["mean_reward"]}
        if row["successes"] is not None:
            said["success"] = row["successes"] / row["episodes"]
        self._set({prefix(suite) + metric: value for metric, value in said.items()})

    def on_run_end(self, summary: dict[str, Any] | None) -> None:
        """The last values stay until the driver's process ends."""
        self._set({})

    def _set(self, row: Mapping[str, float]) -> None:
        """Set these values, and those before them again: Ray sends each once, and what a busy node misses is lost."""
        self._values |= {name: value for name, value in row.items() if name.isidentifier()}
        for name, value in self._values.items():
            if name not in self._gauges:
                about = _ABOUT.get(name, name)
                self._gauges[name] = Gauge(PREFIX + name, about, tag_keys=("run",))
            self._gauges[name].set(value, self._tags)
