"""Gauges of Ray's exporter: each has the number of its own metric."""

from __future__ import annotations

from typing import Any

import pytest

from deploy.cluster import exporter


def test_a_suite_has_gauges_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: dict[str, float] = {}

    class Gauge:
        def __init__(self, name: str, about: str, tag_keys: tuple[str, ...]) -> None:
            self._name = name

        def set(self, value: float, tags: dict[str, str]) -> None:
            shown[self._name] = value

    monkeypatch.setattr(exporter, "Gauge", Gauge)
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
