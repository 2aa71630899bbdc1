"""Two evaluations of the same tasks, compared task by task."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from deploy.config.config_errors import ConfigError
from deploy.report.comparison import Comparison, stored_evaluation, stored_tasks
from deploy.report.statistics import RESAMPLES
from rollout.wire.trajectory import EndReason
from tests.deploy.report.test_episodes import episode, store


def stored(folder: Path, verdicts: dict[int, Sequence[bool]]) -> Path:
    """An evaluation with these verdicts of the samples of each seed, each rewarded by 1 where it succeeded."""
    store(
        folder, *(episode([each], success=each, seed=seed) for seed, own in verdicts.items() for each in own)
    )
    return folder


def test_a_difference_is_paired_by_task(tmp_path: Path) -> None:
    # Tasks differ much from one another, the two evaluations of a task in one of them alone.
    first = {seed: [seed % 2 == 0 or seed < 8] for seed in range(40)}
    second = {seed: [seed % 2 == 0] for seed in range(41)}
    found = Comparison.of(*(stored_tasks(stored(tmp_path / n, v)) for n, v in (("1", first), ("2", second))))
    assert found.success is not None
    assert (found.tasks, found.unpaired, found.won, found.lost, found.p_value) == (40, 1, 4, 0, 0.125)
    assert (found.success.first, found.success.second) == (24 / 40, 20 / 40)
    assert found.success.difference == pytest.approx(4 / 40)
    low, high = found.success.interval
    # How often one of the four tasks is drawn is binomial(40, 4/40): its quantiles are 1 and 8.
    assert (low, high) == (pytest.approx(1 / 40), pytest.approx(8 / 40))
    assert "difference +0.100 (95% interval +0.025 to +0.200, paired by task)" in str(found)
    assert "4 won and 0 lost; McNemar's exact test: p = 0.125" in str(found)


def test_the_interval_is_that_of_all_resamples_of_the_tasks(tmp_path: Path) -> None:
    # Differences of the tasks' means: 0, 0, 1/2, 1/2, 1, 1.
    first = {0: [True, False], 1: [False], 2: [True, False], 3: [True, True], 4: [True], 5: [True, True]}
    second = {
        0: [False, True],
        1: [False, False],
        2: [False, False],
        3: [True, False],
        4: [False, False],
        5: [False],
    }
    found = Comparison.of(*(stored_tasks(stored(tmp_path / n, v)) for n, v in (("1", first), ("2", second))))
    sums = np.sort([sum(drawn) for drawn in product((0, 0, 1, 1, 2, 2), repeat=6)])  # in halves, of all 6^6
    low, high = sums[int(0.025 * len(sums))], sums[int(0.975 * len(sums))]
    # So many resamples cannot end elsewhere: the quantiles lie 3.8 standard errors or more inside of these values.
    error = (0.025 * 0.975 / RESAMPLES) ** 0.5
    for end, quantile in ((low, 0.025), (high, 0.975)):
        assert np.mean(sums < end) + 3.8 * error < quantile < np.mean(sums <= end) - 3.8 * error
    assert found.reward.interval == pytest.approx((low / 12, high / 12), abs=1e-12)
    assert found.success is not None and found.success.interval == found.reward.interval
    assert found.reward.difference == 0.5 and found.p_value is None, "several samples a task"


def test_failed_episodes_are_left_out_and_other_tasks_refused(tmp_path: Path) -> None:
    broken = episode([0], EndReason.FAILED, seed=0, error="Traceback")
    store(tmp_path / "1", broken, *(episode([1], seed=seed) for seed in (1, 2)))
    store(tmp_path / "2", *(episode([0.5], seed=seed) for seed in (0, 1, 2)))
    store(tmp_path / "3", episode([0.5], seed=7))
    first, second, third = (stored_tasks(tmp_path / name) for name in "123")
    found = Comparison.of(first, second)
    assert (found.tasks, found.unpaired, found.success) == (2, 1, None)
    assert found.reward.difference == 0.5 and found.reward.interval == (0.5, 0.5)
    with pytest.raises(ConfigError, match="no task in common"):
        Comparison.of(first, third)
    assert stored_evaluation(tmp_path / "1").failed == 1
