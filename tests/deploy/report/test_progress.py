from __future__ import annotations

import io

import pytest
from rich.console import Console

from deploy.report import progress as progress_module
from deploy.report.progress import Progress


def _row(step: int, wait: float = 6.0) -> dict[str, float]:
    return {
        "reward": 0.25,
        "entropy": 0.9,
        "kl": 0.001,
        "rollout_tokens_per_s": 12345.0,
        "learner_tokens_per_s": 2000.0,
        "lag_mean": 0.5,
        "lag_max": 1.0,
        "sync_stall_ms": 7.0,
        "wait_s": wait,
        "train_s": 10.0 - wait,
        "publish_s": 0.0,
        "step_s": 10.0,
        "success": step / 100,
    }


def test_a_file_gets_one_plain_line_every_few_steps_and_the_last() -> None:
    out = io.StringIO()
    with Progress(12, "frozen_lake [run]", Console(file=out, width=60)) as progress:
        progress.begin_steps()
        for step in range(1, 13):
            progress.update(step, _row(step))
    lines = out.getvalue().splitlines()
    assert "frozen_lake [run]" in lines[0]  # brackets are text, not markup
    assert [line.split("step ")[1].split()[0] for line in lines[1:]] == ["1/12", "5/12", "10/12", "12/12"]
    assert "success 12.0%" in lines[-1]
    assert "waited for rollouts 60%" in lines[-1]
    assert "\x1b" not in out.getvalue()


def test_a_log_is_silent_for_a_minute_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    now, out = [0.0], io.StringIO()
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    progress = Progress(40, "run", Console(file=out))
    progress.plain_line("run")
    progress.begin_steps(20)
    for step, at in ((21, 50.0), (22, 75.0), (23, 105.0), (24, 110.0)):
        now[0] = at
        progress.update(step, _row(step))
    now[0] = 164.9
    assert progress.break_silence() == pytest.approx(0.1)
    now[0] = 165.0
    assert progress.break_silence() == 60.0
    with progress.phase("evaluation", 8) as phase:
        phase.advance(1, success=0.5)
        now[0] = 230.0
        progress.break_silence()
    told = [" ".join(line.partition("] ")[2].split()[:3]) for line in out.getvalue().splitlines()]
    # The first step of a session, one that comes half a minute after a line, and what is under way after a minute.
    assert told == [
        "run",
        "step 21/40 reward",
        "step 23/40 reward",
        "step 25/40: under",
        "evaluation 1/8 success",
    ]


def test_a_phase_is_told_in_quarters() -> None:
    out = io.StringIO()
    with Progress(1, "run", Console(file=out)) as progress, progress.phase("warm start", 100) as phase:
        for done in range(100):
            phase.advance(1, loss=2.0 - done / 100)
    lines = [line for line in out.getvalue().splitlines() if "warm start" in line]
    assert [line.partition("warm start")[2].split()[0] for line in lines] == [
        "25/100",
        "50/100",
        "75/100",
        "100/100",
    ]
    assert "loss 1.01" in lines[-1]


def test_a_terminal_shows_bars_table_and_verdict() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=110, height=40)
    with Progress(20, "frozen_lake", console) as progress:
        progress.begin_steps(10)
        progress.update(11, _row(11, wait=2.0))
        progress.say("before: success 0.14")
    shown = out.getvalue()
    for text in ("11/20", "12,345", "11.0%", "learner-bound: trained 80%", "before: success 0.14"):
        assert text in shown


def test_a_step_without_a_verdict_of_the_environment_shows_no_success() -> None:
    out = io.StringIO()
    row = _row(1)
    del row["success"]
    with Progress(1, "run", Console(file=out)) as progress:
        progress.begin_steps()
        progress.update(1, row)
    assert "success –" in out.getvalue()


def test_steps_are_not_shown_before_they_begin() -> None:
    with (
        Progress(1, "run", Console(file=io.StringIO())) as progress,
        pytest.raises(ValueError, match="begin_steps"),
    ):
        progress.update(1, _row(1))
