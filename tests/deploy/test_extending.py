"""The guide to parts of one's own is a module and a recipe that train; trackers hear a run and never end it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from deploy.config.config import RunConfig
from deploy.config.load import load_config
from deploy.config.own_parts import own_parts
from deploy.config.trackers import OwnTracker, Trackers
from deploy.report.metrics import read_metrics, stage_folder
from deploy.run.preflight import check
from tests.deploy.small_run import assert_balanced, train, trained_rows

GUIDE = (Path(__file__).parents[2] / "docs" / "extending.md").read_text(encoding="utf-8")
HERE = Path(__file__).parent / "small.toml"
CRITIC = (
    "learner.algorithm.advantage={kind='mine:return_minus_value'}",
    "learner.algorithm.critic.kind=shared",
)


@pytest.fixture
def guide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The guide's recipe over the small one of the tests; its module lies beside."""
    blocks = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)
    (tmp_path / "mine.py").write_text("\n\n".join(blocks), encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    (own,) = re.findall(r"```toml\n(.*?)```", GUIDE, re.DOTALL)
    small = re.sub(r"\n\[agent\]\nmemory.*\n", "\n", HERE.read_text(encoding="utf-8"))
    small = small.replace("\n[buffer]\n", "\n[buffer]\nsegment_mib = 64\n")
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(_over(own, small), encoding="utf-8")
    return recipe


def _over(own: str, small: str) -> str:
    """Top-level options first, in TOML's way; the guide's sections are none of the small recipe's, lists may go on."""
    top, bracket, sections = own.partition("\n[")
    assert set(re.findall(r"^\[([\w.]+)\]", own, re.MULTILINE)).isdisjoint(
        re.findall(r"^\[([\w.]+)\]", small, re.MULTILINE)
    )
    return f"{top}\n{small}\n{bracket}{sections}"


def _configured(recipe: Path, *overrides: str) -> RunConfig:
    return load_config(
        str(recipe),
        ["steps=3", "rollout.context_tokens=400", "buffer.reuse.max_lag=2", "evaluation.tasks=2", *overrides],
    )


def test_the_guides_own_parts_train_and_its_tracker_hears_of_it(guide: Path, tmp_path: Path) -> None:
    config = _configured(guide)
    assert len(list(own_parts(config))) == 10
    check(config)
    train(config, tmp_path / "run")
    assert_balanced(tmp_path / "run", config)
    rows = read_metrics(tmp_path / "run")
    assert rows[0]["gate_open"] == 1.0 and rows[0]["distance"] == pytest.approx(0.0, abs=1e-6)
    assert all(0.0 <= row["gate_open"] <= 1.0 for row in rows) and rows[-1]["distance"] > 0.0
    assert [row.get("groups_reused", 0.0) for row in rows] == [0.0, 1.0, 1.0]
    rewarded = read_metrics(stage_folder(tmp_path / "run", 1))
    assert [row["step"] for row in rewarded] == [1, 2, 3, 4]
    assert all(row["loss"] > 0 and row["skipped_step"] == 0 for row in rewarded)
    valued = read_metrics(stage_folder(tmp_path / "run", 2))
    assert [row["loss"] for row in valued] == sorted((row["loss"] for row in valued), reverse=True)
    assert len(valued) == 3 and all(row["head_grad_norm"] > 0 for row in valued)
    stored = trained_rows(tmp_path / "run")
    assert any('"turn 1' in row["observation"] for row in stored)
    assert any('"length"' in (row["named_rewards"] or "") for row in stored)
    lines = (tmp_path / "run" / "lines.txt").read_text(encoding="utf-8").splitlines()
    assert [line.split()[:2] for line in lines[1:4]] == [["step", "1"], ["step", "2"], ["step", "3"]]
    assert [line.split()[0] for line in (lines[0], *lines[4:])] == ["before", "after", "ended"]
    assert [float(line.split()[2]) for line in lines[1:4]] == [row["reward"] for row in rows]


def test_the_guides_estimator_with_a_critic_fits(guide: Path) -> None:
    check(_configured(guide, *CRITIC))


def test_the_guides_table_counts_the_lines_of_its_examples() -> None:
    examples = {
        name: body
        for body, name in re.findall(
            r"^((?:def|class) (\w+)\W(?:.*\n)*?)(?=\n(?:def|class) |```)", GUIDE, re.MULTILINE
        )
    }
    counted = {
        name: len([line for line in body.splitlines() if line.strip()]) for name, body in examples.items()
    }
    table = dict(re.findall(r"^\| ([\w' ]+?) \|.*\| 0 \| (\d+) \|$", GUIDE, re.MULTILINE))
    assert counted == {
        "gated": int(table["loss"]),
        "against_the_median": int(table["advantage estimator"]),
        "return_minus_value": int(table["the same with a critic"]),
        "halved": int(table["correction"]),
        "stay_close": int(table["regularizer"]),
        "best_first": int(table["sampler of the buffer's reuse"]),
        "Numbered": int(table["agent part"]),
        "short": int(table["reward"]),
        "Lines": int(table["metric tracker"]),
        "Rewarded": int(table["stage"]),
        "Valued": int(table["the same with modules of its own"]),
    }


def _heard(path: Path, fails_in: str) -> OwnTracker:
    return OwnTracker.model_validate(
        {"kind": "tests.own_parts:Heard", "path": str(path), "fails_in": fails_in}
    )


def test_an_error_of_a_tracker_is_one_notice_and_the_others_hear_on(tmp_path: Path) -> None:
    said: list[str] = []
    broken = OwnTracker.model_validate({"kind": "tests.own_parts:Heard"})  # its constructor lacks a path
    trackers = Trackers(
        [_heard(tmp_path / "one", "on_step"), broken, _heard(tmp_path / "two", "")], said.append
    )
    trackers.tell("on_run_start", {"name": "mine"}, tmp_path)
    for step in (1.0, 2.0):
        trackers.tell("on_step", {"step": step})
    trackers.tell("on_run_end", None)
    trackers.close()
    heard = [(tmp_path / name).read_text(encoding="utf-8").splitlines() for name in ("one", "two")]
    assert heard[0] == heard[1]
    assert heard[0][1:] == ["on_step 1.0", "on_step 2.0", "on_run_end None"]
    assert len(said) == 2
    assert all(notice.startswith("tracker tests.own_parts:Heard failed in ") for notice in said)
    assert "failed in __init__: " in said[0] and "failed in on_step: OSError" in said[1]
