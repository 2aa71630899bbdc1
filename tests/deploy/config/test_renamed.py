"""Old names: refused with the new one where a person says them, and understood where an earlier run stored them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deploy.config import renamed, run_folder
from deploy.config.config import RunConfig
from deploy.config.config_errors import ConfigError, option_names
from deploy.config.version import VERSION
from tests.deploy.command import command
from tests.deploy.small_run import RECIPE, configured


def test_an_old_name_is_refused_with_the_new_one(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"^[^\n]*option rollout\.drop_uniform is called rollout\.dynamic_sampling now"
    ):
        configured("rollout.drop_uniform=true")
    with pytest.raises(
        ConfigError, match=r"guards\.metric='cut_short' is called 'truncated_without_bootstrap' now"
    ):
        configured("guards=[{metric='kl', above=1.0}, {metric='cut_short', above=0.5}]")


def test_a_renamed_section_value_and_moved_option_are_found_wherever_they_lie(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    moves = {
        "a.old": "a.new",
        "a.new.kind=x": "a.new.kind=y",
        "b.each.was": "b.each.is",
        "c.gone": "d.here.found",
    }
    monkeypatch.setattr(renamed, "RENAMED", moves)
    tree = {"a": {"old": {"kind": "x", "n": 1}}, "b": {"each": [{"was": 1}, {"other": 2}]}, "c": {"gone": 3}}
    assert renamed.with_current_names(tree) == {
        "a": {"new": {"kind": "y", "n": 1}},
        "b": {"each": [{"is": 1}, {"other": 2}]},
        "c": {},
        "d": {"here": {"found": 3}},
    }
    assert tree["c"] == {"gone": 3}, "what was given stays as it is"
    with pytest.raises(ConfigError) as refused:
        renamed.require_current_names(tree, "mine.toml")
    for said in ("a.old is called a.new", "a.new.kind='x' is called 'y'", "c.gone is called d.here.found"):
        assert said in str(refused.value)


def test_every_new_name_is_an_option() -> None:
    names = [new.partition("=")[0] for new in renamed.RENAMED.values()]
    names += [new.replace(".0", "") for new in renamed.STAGED.values()]
    assert set(names) <= set(option_names(RunConfig))


def stored(folder: Path, **changes: object) -> dict[str, object]:
    """The configuration of a run as the version before this one wrote it, with these options."""
    tree = configured().model_dump(mode="json")
    tree["rollout"]["drop_uniform"] = tree["rollout"].pop("dynamic_sampling") or True
    tree["supervision"]["frozen_seconds"] = tree["supervision"].pop("heartbeat_timeout_seconds")
    tree["evaluation"]["seconds"] = tree["evaluation"].pop("timeout_seconds") + 1
    algorithm = tree["learner"]["algorithm"]
    algorithm["credit"] = algorithm.pop("advantage") | {"kind": "group"}
    tree["guards"] = [{"metric": "cut_short", "above": 0.5, "below": None, "action": "warn", "steps": 1}]
    (folder / "config.json").write_text(json.dumps(tree | changes), encoding="utf-8")
    return tree


def test_the_sections_that_became_a_stage_are_refused_and_read(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError,
        match=r'section warm_start is called stages\.0\.source now, in \[\[stages\]\] with kind = "sft"',
    ):
        configured("warm_start.episodes=4")
    with pytest.raises(ConfigError, match=r"section learner\.imitation is called stages\.0 now"):
        configured("learner.imitation.epochs=4")
    now = configured()
    (sft,) = now.model_dump(mode="json")["stages"]
    before = {name: sft[name] for name in ("optim", "epochs", "episodes_per_step", "threads")}
    source = {name: sft["source"][name] for name in ("episodes", "error_rate")}
    for warm_start, stages in ((source, now.stages), (None, ())):
        tree = now.model_dump(mode="json")
        del tree["stages"]
        tree["learner"]["imitation"] = before
        (tmp_path / "config.json").write_text(json.dumps(tree | {"warm_start": warm_start}), encoding="utf-8")
        assert run_folder.open_existing(tmp_path) == now.model_copy(update={"stages": stages})


def test_the_folder_of_an_earlier_version_is_read_under_the_new_names(tmp_path: Path) -> None:
    stored(tmp_path)
    config = run_folder.open_existing(tmp_path)
    assert config.rollout.dynamic_sampling
    assert config.learner.algorithm == configured().learner.algorithm
    assert [guard.metric for guard in config.guards] == ["truncated_without_bootstrap"]
    assert config.supervision == configured().supervision
    assert config.evaluation.timeout_seconds == configured().evaluation.timeout_seconds + 1


def test_a_folder_that_cannot_be_read_is_refused_with_the_version_that_wrote_it(tmp_path: Path) -> None:
    stored(tmp_path, of_another_age=1)
    said = f"written by Manta before 0.2, read by Manta {VERSION}): unknown option of_another_age"
    with pytest.raises(ConfigError) as refused:
        run_folder.open_existing(tmp_path)
    assert said in str(refused.value) and "\n" not in str(refused.value)
    stored(tmp_path, of_another_age=1, manta_version="7.1.0")
    with pytest.raises(ConfigError, match=r"written by Manta 7\.1\.0, read by"):
        run_folder.open_existing(tmp_path)


def test_a_run_folder_says_which_version_wrote_it(tmp_path: Path) -> None:
    config = configured("name=café")
    run_folder.create(config, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["manta_version"] == VERSION
    assert run_folder.open_existing(tmp_path) == config


@pytest.mark.parametrize(("flag", "now"), [("--run", "--run-dir"), ("--runs", "--output-dir")])
def test_an_old_flag_is_told_its_name(
    flag: str, now: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = command(monkeypatch, capsys)("train", RECIPE, flag, "somewhere")
    assert (code, err.count("\n")) == (2, 1) and f"option {flag} is called {now} now" in err
