"""Whole runs of a model that sees: it learns what only the picture tells, and goes on after a stop."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploy.config.load import load_config
from deploy.report.metrics import read_metrics
from rollout.wire.images import images_in
from tests.deploy.small_run import Stopped, assert_balanced, same_bits, train, trained_rows

RECIPE = str(Path(__file__).with_name("seeing.toml"))


@pytest.mark.slow
def test_a_policy_learns_to_look(tmp_path: Path) -> None:
    config = load_config(RECIPE, ())
    summary = train(config, tmp_path / "run")
    assert_balanced(tmp_path / "run", config)
    assert summary["success_before"] + 0.15 < summary["success_after"] > 0.8, summary
    assert all(row["behavior_gap"] < 1e-4 for row in read_metrics(tmp_path / "run"))
    assert all(len(images_in(row["observation"])) == 1 for row in trained_rows(tmp_path / "run"))
    assert "[picture, " in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_run_with_pictures_goes_on_after_a_stop_as_if_there_had_been_none(tmp_path: Path) -> None:
    sizes = ("steps=3", "checkpoint.every_steps=1", "evaluation.tasks=0", "stages.0.source.episodes=8")
    config = load_config(RECIPE, (*sizes, "env.options.level=3", "rollout.context_tokens=64"))
    train(config, tmp_path / "straight")
    with pytest.raises(Stopped):
        train(config, tmp_path / "stopped", stop_after=2)
    train(config, tmp_path / "stopped", resume=True)
    assert same_bits(tmp_path / "straight", tmp_path / "stopped")
