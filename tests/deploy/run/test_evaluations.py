"""Evaluations of a run: before, during and after training, by suites, each of one version; the best one is kept."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deploy.config.config_errors import ConfigError
from deploy.report.metrics import read_metrics
from deploy.run.evaluate import best_checkpoint, suite_conditions
from learner.training.checkpoint import best_version, versions
from rollout.buffer.segments import read_rows
from tests.deploy.command import Manta, command
from tests.deploy.small_run import Stopped, configured, same_bits, train

SUITES = (
    "[{name='greedy', tasks=3, samples=1, majority='none', sampling={temperature=0.0}}, "
    "{name='sums', env='arithmetic', options={level=1, instructions=false}, tasks=2, samples=3, "
    "sampling={max_tokens=1}}]"
)
EVALUATED = (
    "steps=6", "rollout.workers=2", "rollout.context_tokens=96",
    f"evaluation={{tasks=4, samples=4, majority='text', every_steps=2, options={{split='heldout'}}, suites={SUITES}}}",
    "checkpoint={every_steps=6, keep=1, best_metric='eval_pass@2'}",
)  # fmt: skip
WHEN = ["before", "step-00000002", "step-00000004", "after"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluated") / "run"
    train(configured(*EVALUATED), folder)
    return folder


def episodes(run: Path, name: str) -> list[dict[str, Any]]:
    """The last row of every stored episode."""
    return [row for row in read_rows(run / "evaluations" / name).to_pylist() if row["end_reason"]]


def test_every_evaluation_is_of_one_version_although_training_goes_on(run: Path) -> None:
    for version, when in zip((0, 2, 4, 6), WHEN, strict=True):
        for suite in ("", "greedy/", "sums/"):
            rows = read_rows(run / "evaluations" / f"{suite}{when}").to_pylist()
            assert {sampled for row in rows for sampled in row["versions"]} == {version}
    waited = {row["step"]: "eval_wait_s" in row for row in read_metrics(run)}
    assert waited == {1: False, 2: False, 3: True, 4: False, 5: True, 6: False}


def test_a_suite_has_its_own_tasks_samples_and_sampling(run: Path) -> None:
    for when in WHEN:
        own, greedy, sums = (episodes(run, f"{suite}{when}") for suite in ("", "greedy/", "sums/"))
        assert [len(rows) for rows in (own, greedy, sums)] == [16, 3, 6]
        assert sorted({row["episode"] for row in own}) == [0, 1, 2, 3]
        assert {row["env_id"] for row in sums} == {"arithmetic"}
        assert all(json.loads(row["env_options"])["split"] == "heldout" for row in own + greedy)
        assert {len(row["action_ids"]) for row in sums} == {1}
        assert max(len(row["action_ids"]) for row in own) == 2  # sampling.max_tokens


def test_metrics_are_those_of_the_stored_episodes(run: Path) -> None:
    rows = read_metrics(run / "evaluations")
    assert [row["step"] for row in rows] == [0, 2, 4, 6]
    for row, when in zip(rows, WHEN, strict=True):
        own = episodes(run, when)
        seeds = {episode["seed"] for episode in own}
        by_task = [[bool(e["success"]) for e in own if e["seed"] == seed] for seed in seeds]
        pairs = [any(pair) for task in by_task for pair in combinations(task, 2)]
        assert row["eval_success"] == row["eval_pass@1"] == pytest.approx(np.mean(by_task))
        assert row["eval_pass@2"] == pytest.approx(np.mean(pairs))
        assert row["eval_pass@4"] == np.mean([any(task) for task in by_task])
        assert 0 <= row["eval_maj@4"] <= 1 and "eval_greedy_pass@1" not in row and "eval_sums_maj@3" in row
    stored = json.loads(
        (run / "evaluations" / "sums" / WHEN[1] / "evaluation.json").read_text(encoding="utf-8")
    )
    assert set(stored["pass_at"]) == {"1", "2", "3"} and stored["samples"] == 3


def test_the_best_version_has_a_checkpoint_beside_the_newest(run: Path) -> None:
    values = {row["step"]: row["eval_pass@2"] for row in read_metrics(run / "evaluations")}
    best = max(values, key=lambda step: (values[step], -step))
    assert best_version(run) == best and versions(run) == sorted({int(best), 6})
    assert best_checkpoint(str(run)) == str(run / "checkpoints" / f"version-{int(best):08d}")


def test_summary_and_report_have_every_suite(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    assert list(summary["suites"]) == ["greedy", "sums"]
    verdicts = [bool(episode["success"]) for episode in episodes(run, "sums/after")]
    assert summary["suites"]["sums"]["success_after"] == np.mean(verdicts)
    assert "Success on greedy" in (run / "report.html").read_text(encoding="utf-8")


def test_a_run_that_is_stopped_during_an_evaluation_repeats_it_and_ends_as_the_others(
    run: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    with pytest.raises(Stopped):
        train(configured(*EVALUATED), folder, stop_after=4)  # the evaluation of version 4 is under way
    train(configured(*EVALUATED), folder, resume=True)
    assert same_bits(run, folder)
    assert read_metrics(run / "evaluations") == read_metrics(folder / "evaluations")
    for when in WHEN:
        assert len(episodes(folder, when)) == 16


def test_the_base_model_is_evaluated_as_the_stages_find_it_and_training_is_the_same(tmp_path: Path) -> None:
    plain, based, stageless = (tmp_path / name for name in ("plain", "based", "stageless"))
    train(configured("steps=1"), plain)
    config = configured("steps=1", "evaluation={base=true, tasks=4, samples=4, options={split='heldout'}}")
    with pytest.raises(Stopped):
        train(config, based, stop_after=0)
    stored = (based / "evaluation_base.json").stat().st_mtime_ns
    summary = train(config, based, resume=True)
    assert (based / "evaluation_base.json").stat().st_mtime_ns == stored
    assert same_bits(plain, based)
    train(configured("steps=1", "stages=", "evaluation.samples=4"), stageless)
    base, before = episodes(based, "base"), episodes(stageless, "before")
    assert [row["action_ids"] for row in base] == [row["action_ids"] for row in before] and len(base) == 16
    assert {version for row in base for version in row["versions"]} == {-1}
    assert summary["success_base"] == np.mean([bool(row["success"]) for row in base])
    assert [row["step"] for row in read_metrics(based / "evaluations")] == [0, 1]
    assert ">base</span>" in (based / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("overrides", [["stages="], ["evaluation.tasks=0"]])
def test_a_base_that_says_nothing_is_refused(overrides: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"evaluation\.base=true .*; remove it"):
        configured("evaluation.base=true", *overrides)


def test_a_suite_of_a_run_is_evaluated_by_name(run: Path) -> None:
    env_id, seeds, conditions = suite_conditions(str(run), "sums")
    assert (env_id, seeds) == ("arithmetic", [0, 1])
    assert (conditions.samples, conditions.sampling.max_tokens, conditions.majority) == (3, 1, "text")
    with pytest.raises(ConfigError, match="no evaluation suite 'sum'; it has greedy, sums"):
        suite_conditions(str(run), "sum")


def test_stored_evaluations_are_shown_written_and_compared(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    manta: Manta = command(monkeypatch, capsys)
    after, before = (str(run / "evaluations" / when) for when in ("after", "before"))
    out = tmp_path / "out"
    code, said, _ = manta(
        "eval", after, "--compare", before, "--show", "1", "--out", str(out), "--majority", "text"
    )
    assert (
        code == 0 and "success" in said and "pass@4" in said and "maj@4" in said and "paired by task" in said
    )
    assert said.lstrip().startswith("seed ") and "assistant" in said
    lines = (out / "episodes.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 16 and json.loads(lines[0])["turns"][0]["messages"][0]["role"] == "user"
    assert json.loads((out / "evaluation.json").read_text(encoding="utf-8"))["episodes"] == 16
    code, _, err = manta("eval", after, "--compare", str(run / "base"))
    assert code == 2 and "name another stored one" in err
