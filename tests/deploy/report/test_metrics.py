from __future__ import annotations

import json
from math import inf, isnan, nan
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from deploy.config.config_errors import ConfigError
from deploy.report.metrics import MetricsLog, read_metrics, rollout_rates
from rollout.wire.metrics import joined


def test_rows_come_back_as_written_and_are_valid_json(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    log.write(1, {"reward": 0.25, "kl": nan})
    log.write(2, {"reward": 0.5, "kl": inf})
    assert [row["reward"] for row in read_metrics(tmp_path)] == [0.25, 0.5]  # before it is closed
    log.close()
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == [1, 2]
    assert all(isnan(row["kl"]) for row in rows)
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text(encoding="utf-8")


def test_a_resumed_run_has_every_step_once(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    for step in range(1, 6):
        log.write(step, {"reward": float(step)})
    log.close()
    resumed = MetricsLog(tmp_path, resume_after=3)
    for step in range(4, 7):
        resumed.write(step, {"reward": step + 0.5})
    resumed.close()
    assert [row["reward"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4.5, 5.5, 6.5]
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in board.Scalars("reward")] == [
        (1, 1),
        (2, 2),
        (3, 3),
        (4, 4.5),
        (5, 5.5),
        (6, 6.5),
    ]


def test_a_torn_last_row_is_passed_over(tmp_path: Path) -> None:
    whole = json.dumps({"step": 1, "reward": 1.0}) + "\n"
    (tmp_path / "metrics.jsonl").write_text(whole + '{"step": 2, "rew', encoding="utf-8")
    assert [row["step"] for row in read_metrics(tmp_path)] == [1]
    log = MetricsLog(tmp_path, resume_after=2)
    log.write(2, {"reward": 2.0})
    log.close()
    assert [row["reward"] for row in read_metrics(tmp_path)] == [1.0, 2.0]


def test_a_damaged_row_is_named(tmp_path: Path) -> None:
    for broken in ('{"step": 2, "rew\n', "[2]\n", '{"stfp": 2}\n'):
        (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n' + broken, encoding="utf-8")
        for read in (read_metrics, lambda folder: MetricsLog(folder, resume_after=2)):
            with pytest.raises(ConfigError, match=r"metrics\.jsonl:2: broken line"):
                read(tmp_path)


def test_an_older_runs_metrics_read_under_the_names_of_today(tmp_path: Path) -> None:
    old = {"step": 1, "reward": 1.0, "tokens_trained": 90.0, "tokens_sampled": 40.0}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(old) + "\n", encoding="utf-8")
    log = MetricsLog(tmp_path, resume_after=1)
    log.write(2, {"rollout_tokens_sampled": 50.0, "tokens_processed": 80.0})
    log.close()
    first, second = read_metrics(tmp_path)
    assert first == {"step": 1, "reward": 1.0, "tokens_processed": 90.0, "rollout_tokens_sampled": 40.0}
    assert second["rollout_tokens_sampled"] == 50.0


def test_no_metric_takes_anothers_place() -> None:
    assert joined({"a": 1.0}, {}, {"b": 2.0}, {"c": 3.0}) == {"a": 1.0, "b": 2.0, "c": 3.0}
    with pytest.raises(ValueError, match=r"^two parts of a row of metrics have the name 'a', 'c'; [^\n]*$"):
        joined({"a": 1.0, "c": 0.0}, {"b": 2.0}, {"c": 0.0, "a": 1.0})


def test_a_run_without_steps_has_no_rows(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []


def test_tool_calls_are_told_for_each_episode_of_a_step_in_runs_that_make_any() -> None:
    before = {"tokens_sampled": 10.0, "episodes": 4.0, "tools_ok": 8.0, "tools_failed": 0.0}
    after = {"tokens_sampled": 30.0, "episodes": 8.0, "tools_ok": 20.0, "tools_failed": 1.0}
    rates = {"rollout_tokens_sampled": 20.0, "rollout_tokens_per_s": 10.0}
    assert rollout_rates(before, after, 2.0) == rates | {"tools_ok": 3.0, "tools_failed": 0.25}
    none_yet = after | {"tools_ok": 0.0, "tools_failed": 0.0}
    assert rollout_rates(before, none_yet, 2.0) == rates
    assert rollout_rates(before, after | {"episodes": 4.0}, 2.0) == rates, "no episode ended"
    assert (
        rollout_rates({"tokens_sampled": 0.0}, {"tokens_sampled": 0.0}, 1.0)["rollout_tokens_sampled"] == 0
    ), "a replay"
