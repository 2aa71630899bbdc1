from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from plotly.offline import get_plotlyjs

from deploy.report.charts import MOST_NAMED, drawn, moving_mean
from deploy.report.episodes import chosen_episodes
from deploy.report.evaluation import Evaluation, figures
from deploy.report.metrics import read_metrics
from deploy.report.report import clock, outcomes, write_report
from rollout.buffer.segments import SegmentWriter
from rollout.episodes.evaluation import EvaluationRow
from rollout.wire.schema import encode
from rollout.wire.trajectory import EndReason, Group, Slot, Task, Trajectory, Turn
from tests.deploy.small_run import configured, train

HOSTILE = "</script><script>alert('pwned')</script> \x1b[31m \u202e"
SHOWN = HOSTILE.replace("\x1b", r"\x1b").replace("\u202e", r"\u202e")
VOID = {"meta", "br", "img", "link", "input", "hr"}


class Outline(HTMLParser):
    """What a page is made of: text, ids, addresses it refers to; fails on tags that do not match."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self.ids += [value or "" for name, value in attrs if name == "id"]
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.text.append(data)


def row(step: int) -> dict[str, float]:
    return {
        "step": step,
        "reward": step / 100,
        "entropy": 1 / step,
        "lag_mean": 0.5,
        "lag_max": 1.0,
        "wait_s": 6.0,
        "train_s": 3.0,
        "publish_s": 0.5,
        "step_s": 10.0,
    }


def run_folder(parent: Path, finished: bool = True) -> Path:
    run = parent / "frozen_lake-20260101"
    run.mkdir()
    (run / "config.json").write_text(json.dumps({"name": "frozen_lake", "note": HOSTILE}), encoding="utf-8")
    (run / "metrics.jsonl").write_text(
        "".join(json.dumps(row(step)) + "\n" for step in range(1, 41)), encoding="utf-8"
    )
    if finished:
        (run / "summary.json").write_text(json.dumps(SUMMARY), encoding="utf-8")
    ids, logprobs = np.array([7, 8], np.int32), np.array([-0.1, -2.0], np.float32)
    step = Turn(0, 0, HOSTILE, HOSTILE, ids, ids, logprobs, np.zeros(2, np.int32), 1.0, "stop")
    task = Task.of("lake", 5)
    trajectory = Trajectory(0, 0, 0, task, (step,), EndReason.TERMINATED, True, worker="rollout-0")
    writer = SegmentWriter(run / "groups", max_bytes=1 << 20)
    writer.append(encode(Group(Slot(0, 0, task, 0), (trajectory,))))
    writer.close()
    return run


SUMMARY = {
    "success_before": 0.14,
    "success_before_interval": [0.1, 0.19],
    "success_after": 0.7,
    "success_after_interval": [0.64, 0.75],
    "seconds": {"start": 25.0, "training": 175.0},
    "tokens_generated": 1234567,
    "tokens_processed": 654321,
    "seed": 3,
    "steps": 40,
    "ledger": {"issued": 10, "trained": 9, "dropped": 1},
}


def outline(page: str) -> Outline:
    # Jinja must have kept every hostile text from being markup, so the two libraries are the only scripts.
    parsed = Outline()
    parsed.feed(page)
    parsed.close()
    assert parsed.open == []
    return parsed


def test_a_report_is_whole_and_needs_nothing_from_outside(tmp_path: Path) -> None:
    page = write_report(run_folder(tmp_path)).read_text(encoding="utf-8")
    parsed = outline(page)
    assert parsed.addresses == []
    assert page.count(get_plotlyjs()) == 1
    ours = page.replace(get_plotlyjs(), "")
    assert "http" not in ours
    assert ours.count("<script>") == 2  # plotly's own and the page's
    charts = json.loads(re.search(r"const CHARTS = (.*);\n", page)[1])  # type: ignore[index]
    assert [f"chart{index}" for index in range(len(charts))] == [
        i for i in parsed.ids if i.startswith("chart")
    ]


def test_the_headline_says_what_the_summary_says(tmp_path: Path) -> None:
    text = " ".join(
        "".join(outline(write_report(run_folder(tmp_path)).read_text(encoding="utf-8")).text).split()
    )
    for said in (
        "14.0 %",
        "70.0 %",
        "10.0–19.0",
        "3 min 20 s",
        "1,234,567",
        "654,321",
        "issued 10, trained 9",
    ):
        assert said.replace(" %", "%") in text, said
    assert "rollout-bound: waited for rollouts 60%" in text
    assert "not finished" not in text


def test_what_an_environment_says_stays_text(tmp_path: Path) -> None:
    page = write_report(run_folder(tmp_path)).read_text(encoding="utf-8")
    assert "alert('pwned')" not in page.replace(get_plotlyjs(), "")
    text = "".join(outline(page).text)
    assert SHOWN in text
    assert SHOWN.replace(r"\x1b", r"\u001b") in text  # in the configuration, which is JSON


def test_an_unfinished_run_has_a_report_too(tmp_path: Path) -> None:
    text = "".join(
        outline(write_report(run_folder(tmp_path, finished=False)).read_text(encoding="utf-8")).text
    )
    assert "not finished" in text
    assert "Success on held-out tasks" not in text


def test_a_run_without_a_step_has_a_report_too(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"name": "empty"}', encoding="utf-8")
    assert "Over the steps" not in "".join(outline(write_report(tmp_path).read_text(encoding="utf-8")).text)


def test_charts_have_gaps_for_what_is_missing_and_shares_that_fill_the_whole() -> None:
    rows = [row(1), row(2), row(3)]
    rows[1]["entropy"] = float("nan")
    del rows[2]["reward"]
    charts = {chart["title"]: chart for chart in drawn(rows)}
    assert charts["Entropy"]["series"][0]["y"] == [1.0, None, 1 / 3]
    assert charts["Reward and success"]["series"][0]["y"] == [0.01, 0.02, None]
    assert len(charts["Reward and success"]["series"]) == 1  # no success was measured
    assert "Gradient" not in charts
    shares = charts["Time of the learner"]["series"]
    assert [sum(series["y"][i] for series in shares) for i in range(3)] == pytest.approx([1, 1, 1])


def test_each_named_reward_has_a_chart_of_its_mean_with_its_spread() -> None:
    rows = [row(step) | {"rewards/a <b>/mean": 0.5, "rewards/a <b>/std": 0.25} for step in (1, 2)]
    rows += [row(3) | {"rewards/late/mean": 1.0, "rewards/late/std": 0.0, "rewards/late/min": 1.0}]
    charts = {chart["title"]: chart for chart in drawn(rows)}
    assert [title for title in charts if title.startswith("Reward:")] == ["Reward: a <b>", "Reward: late"]
    (first,), (late,) = charts["Reward: a <b>"]["series"], charts["Reward: late"]["series"]
    assert (first["y"], first["band"]) == ([0.5, 0.5, None], ([0.25, 0.25, None], [0.75, 0.75, None]))
    assert (late["y"], late["band"]) == ([None, None, 1.0], ([None, None, 1.0], [None, None, 1.0]))
    assert "standard deviation" in charts["Reward: late"]["note"]
    assert charts["Reward and success"]["series"][0]["band"] is None  # this run's rows have no deviation
    many = {f"rewards/{number}/mean": 0.0 for number in range(100)}
    assert sum(chart["title"].startswith("Reward:") for chart in drawn([row(1) | many])) == MOST_NAMED


def test_each_cost_has_a_chart_with_its_limit_and_a_card_with_its_interval() -> None:
    rows = [
        row(step)
        | {"costs/risk/mean": 2.0, "costs/risk/std": 0.5, "costs/dirt/mean": 1.0}
        | {"constraint/risk/limit": 0.5, "constraint/risk/multiplier": step}
        for step in (1, 2)
    ]
    charts = {chart["title"]: chart["series"] for chart in drawn(rows)}
    assert [(series["name"], series["y"]) for series in charts["Cost: risk"]] == [
        ("mean", [2.0, 2.0]),
        ("limit", [0.5, 0.5]),
    ]
    assert [series["name"] for series in charts["Cost: dirt"]] == ["mean"]
    assert [series["y"] for series in charts["Multipliers of constraints"]] == [[1, 2]]
    played = [
        EvaluationRow(place, EndReason.TERMINATED, 1.0, None, 1, 1, 0, None, costs={"risk": place})
        for place in (0, 4)
    ]
    summary = figures({"after": Evaluation.of(played)})
    assert (summary["cost_risk_after"], summary["cost_risk_after_interval"]) == (2.0, [0.0, 4.0])
    (card,) = [card for card in outcomes(summary, "task") if card["title"] == "Cost risk on tasks"]
    assert [(bar["when"], bar["said"], bar["low"], bar["high"]) for bar in card["bars"]] == [
        ("after", "2", "0", "4")
    ]


def test_lengths_learning_rate_and_advantages_are_drawn_as_a_step_describes_them(tmp_path: Path) -> None:
    train(configured("steps=1"), tmp_path / "run")
    (measured,) = read_metrics(tmp_path / "run")
    charts = {chart["title"]: chart for chart in drawn([measured])}
    for title, keys in {
        "Turns per episode": ("turns_p50", "turns_p95", "turns_max"),
        "Sampled tokens per episode": tuple(f"sampled_per_episode_{way}" for way in ("p50", "p95", "max")),
        "Learning rate": ("learning_rate",),
        "Episodes without advantage": ("zero_advantage_fraction",),
    }.items():
        assert [series["y"] for series in charts[title]["series"]] == [[measured[key]] for key in keys]
    shown = [episode for episode in chosen_episodes(tmp_path / "run") if "training" in episode.why]
    assert shown and all(turn.advantage is not None for episode in shown[-3:] for turn in episode.turns)


@pytest.mark.skipif(shutil.which("chromium") is None, reason="there is no Chromium here")
def test_a_short_run_has_ticks_at_whole_steps_alone(tmp_path: Path) -> None:
    run = run_folder(tmp_path)
    rows = "".join(json.dumps(row(step)) + "\n" for step in (1, 2, 3))
    (run / "metrics.jsonl").write_text(rows, encoding="utf-8")
    page = write_report(run)
    flags = (
        "--headless",
        "--no-sandbox",
        f"--user-data-dir={tmp_path / 'chromium'}",
        "--virtual-time-budget=3000",
    )
    done = subprocess.run(
        ["chromium", *flags, "--dump-dom", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    ticks = re.findall(r'<g class="xtick">.*?<text[^>]*>([^<]*)</text>', done.stdout)
    assert len(ticks) >= 3 and set(ticks) == {"1", "2", "3"}


def test_the_moving_mean_looks_back_only_and_leaves_gaps_out() -> None:
    assert moving_mean([1.0, None, 4.0, 6.0], 2) == [1.0, 1.0, 4.0, 5.0]
    assert moving_mean([None, 2.0], 1) == [None, 2.0]


@pytest.mark.parametrize(
    ("seconds", "said"), [(8.24, "8.2 s"), (185, "3 min 05 s"), (3599.7, "1 h 00 min"), (7620, "2 h 07 min")]
)
def test_durations_read_well(seconds: float, said: str) -> None:
    assert clock(seconds) == said


def test_a_run_without_verdicts_is_headed_by_its_reward(tmp_path: Path) -> None:
    run = run_folder(tmp_path, finished=False)
    rows = {"successes": None, "episodes": 4, "failed": 0}
    for when, mean, interval in (("before", -0.5, [-1.0, 0.0]), ("after", 0.25, [0.125, 0.5])):
        stored = rows | {"mean_reward": mean, "reward_interval": interval, "held_out": False}
        (run / f"evaluation_{when}.json").write_text(json.dumps(stored), encoding="utf-8")
    text = " ".join("".join(outline(write_report(run).read_text(encoding="utf-8")).text).split())
    assert "Reward on evaluation tasks -0.5→ 0.25" in text and "-1–0" in text and "0.125–0.5" in text
    assert "scale from -1 to 0.5" in text
    assert "Success on" not in text and "held-out" not in text
