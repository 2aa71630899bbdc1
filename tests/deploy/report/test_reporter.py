"""A run has a report while it goes on and when it stops, and waits for none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deploy.config.config_errors import ConfigError
from deploy.report import reporter
from deploy.report.report import REPORT_FILE, write_report
from deploy.report.reporter import ERR_FILE, Reporter
from tests.deploy.report.test_report import run_folder
from tests.deploy.small_run import Stopped, configured, train


def test_a_run_that_is_stopped_has_a_report(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(Stopped):
        train(configured(), run, stop_after=1)
    page = (run / REPORT_FILE).read_text(encoding="utf-8")
    assert "not finished" in page and "Reward and success" in page
    assert not (run / ERR_FILE).exists()


def test_reports_are_written_one_at_a_time_and_cost_a_share_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, now, said = run_folder(tmp_path, finished=False), [0.0], []
    monkeypatch.setattr(reporter.time, "monotonic", lambda: now[0])
    reports = Reporter(run, said.append)
    reports.refresh()
    assert reports._process is None  # the run has just begun
    now[0] = 10.0
    reports.refresh()
    first = reports._process
    assert first is not None
    reports.refresh()
    assert reports._process is first
    assert first.wait(60) == 0 and (run / REPORT_FILE).is_file()
    now[0] = 12.0
    reports.refresh()
    assert reports._process is None  # two seconds for one report: none before 40 have passed
    now[0] = 50.0
    reports.refresh()
    assert reports._process is not None
    reports.close()
    assert said == []


def test_a_report_that_cannot_be_written_is_said_in_a_line_and_ends_nothing(tmp_path: Path) -> None:
    run, said = run_folder(tmp_path, finished=False), []
    (run / "metrics.jsonl").write_text("{\n", encoding="utf-8")
    Reporter(run, said.append).last()
    assert len(said) == 1 and "JSONDecodeError" in said[0] and ERR_FILE in said[0]


def test_a_run_without_a_figure_has_no_report_at_its_stop(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    Reporter(tmp_path, print).last()
    assert not (tmp_path / REPORT_FILE).exists()


@pytest.mark.parametrize("stored", [None, "[]", '{"a'])
def test_a_folder_that_is_no_run_is_refused_in_a_line(tmp_path: Path, stored: str | None) -> None:
    if stored is not None:
        (tmp_path / "config.json").write_text(stored, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"config\.json"):
        write_report(tmp_path)


def test_a_live_run_is_shown_by_the_evaluations_it_has_made(tmp_path: Path) -> None:
    run = run_folder(tmp_path, finished=False)
    stored = {"successes": 3, "episodes": 4, "mean_reward": 0.5, "failed": 0, "held_out": True}
    (run / "evaluation_before.json").write_text(json.dumps(stored), encoding="utf-8")
    assert "Success on held-out tasks" in write_report(run).read_text(encoding="utf-8")
