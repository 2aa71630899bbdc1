from __future__ import annotations

import pytest

from deploy.config.guards import DEFAULTS, MISSING_STEPS, Guard, GuardMonitor, GuardTripped, with_defaults


def test_a_guard_warns_once_until_its_metric_was_within_bounds_again() -> None:
    said: list[str] = []
    monitor = GuardMonitor([Guard(metric="kl", above=0.5, steps=2)], said.append)
    for step, kl in enumerate([0.6, 0.4, 0.6, 0.7, 0.8, 0.1, 0.9, float("nan")]):
        monitor.observe(step, {"kl": kl})
    monitor.observe(9, {})  # a step without the metric is no step within bounds, and none outside
    assert said == [
        "ALARM: step 3: kl is 0.7 (kl above 0.5 for 2 steps)",
        "ALARM: step 7: kl is nan (kl above 0.5 for 2 steps)",
    ]


def test_a_guard_ends_the_run_where_that_is_asked() -> None:
    monitor = GuardMonitor([Guard(metric="entropy", below=0.1, action="stop")], print)
    monitor.observe(1, {"entropy": 0.1})
    with pytest.raises(GuardTripped, match=r"step 2: entropy is 0\.05"):
        monitor.observe(2, {"entropy": 0.05})


def test_a_metric_that_stays_away_is_said_once_until_it_is_back() -> None:
    said: list[str] = []
    monitor = GuardMonitor([Guard(metric="entropy", below=0.1)], said.append)
    for step in range(1, 3 * MISSING_STEPS):
        monitor.observe(step, {"entropy": 1.0} if step == MISSING_STEPS + 2 else {})
    message = "entropy was missing for 10 steps; its guard cannot act"
    assert said == [f"ALARM: step 10: {message}", f"ALARM: step 22: {message}"]


def test_a_default_guard_says_nothing_of_what_an_algorithm_never_has() -> None:
    said: list[str] = []
    monitor = GuardMonitor(DEFAULTS, said.append)
    for step in range(3 * MISSING_STEPS):
        monitor.observe(step, {"kl": 0.0} if step == 0 else {})
    assert said == [f"ALARM: step {MISSING_STEPS}: kl was missing for 10 steps; its guard cannot act"]


def test_a_guard_of_ones_own_takes_the_place_of_its_metrics_default_alone() -> None:
    own = Guard(metric="kl", above=9.0)
    guards = with_defaults([own])
    assert [guard for guard in guards if guard.metric == "kl"] == [own]
    assert set(guards) - {own} == {guard for guard in DEFAULTS if guard.metric != "kl"}


def test_metrics_of_one_lag_are_bounded_like_those_of_all() -> None:
    monitor = GuardMonitor([Guard(metric="effective_samples_lag_3", below=0.5, action="stop")], print)
    monitor.observe(1, {"effective_samples_lag_1": 0.1})
    with pytest.raises(GuardTripped, match=r"effective_samples_lag_3 is 0\.4"):
        monitor.observe(2, {"effective_samples_lag_3": 0.4})
    with pytest.raises(ValueError, match="unknown metric 'entropy_lag_3'"):
        Guard(metric="entropy_lag_3", below=0.5)
