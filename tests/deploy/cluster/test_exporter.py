"""Gauges of Ray's exporter: each has the number of its own metric."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from deploy.cluster import exporter


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """What was set."""
    found: dict[str, float] = {}

    class Gauge:
        def __init__(self, name: str, about: str, tag_keys: tuple[str, ...]) -> None:
            self._name = name

        def set(self, value: float, tags: dict[str, str]) -> None:
            found[self._name] = value

    monkeypatch.setattr(exporter, "Gauge", Gauge)
    return found


def test_what_a_node_has_missed_is_set_again(shown: dict[str, float], tmp_path: Path) -> None:
    metrics = exporter.RayMetrics()
    metrics.on_run_start({"steps": 9}, tmp_path)
    metrics.on_eval("before", _result(successes=3))
    shown.clear()
    metrics.on_step({"loss": 0.5, "success/level-1": 1.0})
    once = {"manta_steps": 9.0, "manta_eval_success": 0.75, "manta_eval_reward": 2.0, "manta_loss": 0.5}
    assert shown == once
    shown.clear()
    metrics.on_run_end(None)
    assert shown == once


def test_a_suite_has_gauges_of_its_own(shown: dict[str, float]) -> None:
    metrics = exporter.RayMetrics()
    metrics.on_eval("before", _result(successes=3))
    metrics.on_eval("hard/before", _result(successes=1))
    metrics.on_eval("very-hard/before", _result(successes=0))
    metrics.on_eval("open/before", _result(successes=None))
    assert shown == {
        "manta_eval_success": 0.75,
        "manta_eval_reward": 2.0,
        "manta_eval_hard_success": 0.25,
        "manta_eval_hard_reward": 2.0,
        "manta_eval_open_reward": 2.0,
    }


def _result(successes: int | None) -> dict[str, Any]:
    return {"successes": successes, "episodes": 4, "mean_reward": 2.0}
