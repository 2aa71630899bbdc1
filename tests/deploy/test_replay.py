"""What a run has played can be learned from again, by its own algorithm and by any other."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploy.config import ConfigError, RunConfig
from deploy.metrics import read_metrics
from deploy.replay import ReplayRing, check
from tests.deploy.small_run import configured, same_bits, train


def replayed(past: Path, folder: Path, *overrides: str) -> RunConfig:
    config = configured(f"replay={str(past)!r}", *overrides)
    train(config, folder, ring_type=lambda config, folder, _: ReplayRing(config, folder))
    return config


def test_the_same_algorithm_over_a_runs_past_gives_the_same_parameters_bit_for_bit(
    reference: Path, tmp_path: Path
) -> None:
    replayed(reference, tmp_path / "again")
    assert same_bits(reference, tmp_path / "again")
    rewards = [[row["reward"] for row in read_metrics(run)] for run in (reference, tmp_path / "again")]
    assert rewards[0] == rewards[1]


def test_another_algorithm_learns_something_else_of_the_same_past(reference: Path, tmp_path: Path) -> None:
    replayed(reference, tmp_path / "other", "learner.algorithm.credit.kind=rloo", "steps=3")
    rows = read_metrics(tmp_path / "other")
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert not same_bits(reference, tmp_path / "other")


def test_a_past_that_can_not_be_learned_from_is_refused_in_one_line(reference: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"made 4 steps; say steps=4 or fewer"):
        check(configured(f"replay={str(reference)!r}", "steps=5"))
    with pytest.raises(ConfigError, match=r"no ledger\.sqlite"):
        check(configured(f"replay={str(tmp_path)!r}"))
    with pytest.raises(ConfigError, match="would mean something else"):
        replayed(reference, tmp_path / "words", "tiny.words=['left', 'right']")
