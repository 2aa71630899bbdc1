from __future__ import annotations

import pytest

from deploy.guards import Guard, GuardTripped, Watch


def test_a_guard_warns_once_until_its_metric_was_within_bounds_again() -> None:
    said: list[str] = []
    watch = Watch([Guard(metric="kl", above=0.5, steps=2)], said.append)
    for step, kl in enumerate([0.6, 0.4, 0.6, 0.7, 0.8, 0.1, 0.9, float("nan")]):
        watch.look(step, {"kl": kl})
    watch.look(9, {})  # without the metric nothing is said
    assert said == [
        "ALARM: step 3: kl is 0.7 (kl above 0.5 for 2 steps)",
        "ALARM: step 7: kl is nan (kl above 0.5 for 2 steps)",
    ]


def test_a_guard_ends_the_run_where_that_is_asked() -> None:
    watch = Watch([Guard(metric="entropy", below=0.1, action="stop")], print)
    watch.look(1, {"entropy": 0.1})
    with pytest.raises(GuardTripped, match=r"step 2: entropy is 0\.05"):
        watch.look(2, {"entropy": 0.05})
