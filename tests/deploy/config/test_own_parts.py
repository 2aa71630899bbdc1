"""A user's own parts are found in a configuration, looked at before a run, and named where they do not fit."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from deploy.commands.submit import submit
from deploy.config.config_errors import ConfigError
from deploy.config.load import load_config
from deploy.config.own_parts import check_own_parts, own_parts
from deploy.config.trust import executed, executed_by_evaluation
from deploy.run.preflight import check
from tests.deploy.small_run import configured

MINE = "tests.own_parts:"
ALL = (
    f"learner.algorithm.loss={{kind='{MINE}ppo', low=0.2, high=0.3}}",
    f"learner.algorithm.advantage={{kind='{MINE}leave_one_out'}}",
    "learner.algorithm.proximal=learner",
    f"learner.algorithm.corrections=[{{kind='{MINE}capped'}}, {{kind='tis'}}]",
    f"learner.algorithm.regularizers=[{{kind='{MINE}half_square', reference=true, weight=0.1}}]",
    "learner.algorithm.skip_zero_advantage=false",
    f"buffer.reuse.sampler={MINE}newest_first",
    f"agent={{memory='full', parts=['{MINE}bare']}}",
    f"env.reward={{kind='{MINE}success', bonus=1.0}}",
    f"stages=[{{kind='{MINE}Preferences', source={{episodes=4}}, beta=0.1}}]",
    f"trackers=['{MINE}Heard']",
)
WHERE = [
    "env.reward",
    "agent.parts[0]",
    "buffer.reuse.sampler",
    "learner.algorithm.advantage",
    "learner.algorithm.loss",
    "learner.algorithm.corrections[0]",
    "learner.algorithm.regularizers[0]",
    "stages[0]",
    "trackers[0]",
]


def test_all_own_parts_are_found_and_what_a_stored_run_would_execute() -> None:
    config = configured(*ALL)
    assert [where for where, _ in own_parts(config)] == WHERE
    entries = executed(config)
    assert sorted(entry.partition("=")[0] for entry in entries) == sorted(WHERE)
    assert all(MINE in entry for entry in entries)
    played = executed_by_evaluation(config, "frozen_lake")
    assert {entry.partition("=")[0] for entry in played} == {"env.reward", "agent.parts[0]"}
    assert list(own_parts(load_config("ppo"))) == [] == executed(load_config("ppo"))


def test_a_stored_configuration_with_own_parts_reads_back_and_imports_nothing(tmp_path: Path) -> None:
    config = configured("learner.algorithm.loss={kind='not_there.at:all', power=[1, 2]}", *ALL[1:])
    assert type(config).model_validate_json(config.model_dump_json()) == config
    assert "not_there" not in sys.modules


@pytest.mark.parametrize(
    ("override", "says"),
    [
        (
            "learner.algorithm.loss=nowhere:loss",
            "'nowhere:loss' cannot be imported: there is no module nowhere",
        ),
        (f"learner.algorithm.loss={MINE}absent", "has no function 'absent'"),
        (
            f"learner.algorithm.loss={{kind='{MINE}ppo', low=0.2, hihg=0.3}}",
            r"called as ppo\(logprobs_N, proximal_N, advantages_N, sequence_N, low=..., hihg=...\): ",
        ),
        (
            f"learner.algorithm.loss={MINE}reduced",
            "a number for each token and not reduced, not a tensor of shape",
        ),
        (
            f"learner.algorithm.loss={MINE}alone",
            r"must return \(a tensor \[N\], a dict of statistics \[N\]\)",
        ),
        (f"learner.algorithm.loss={MINE}constant", "without a gradient; compute it from logprobs_N"),
        (
            f"learner.algorithm.loss={MINE}raises",
            r"loss, called on a small example: .*raises failed: KeyError\('missing'\) \(own_parts.py:\d+ in raises\)",
        ),
        (
            f"learner.algorithm.advantage={MINE}one_number",
            r"of shape \(3,\) .* not \(\); episode.over_tokens",
        ),
        (f"learner.algorithm.advantage={MINE}flat", "for every episode of every group"),
        (f"buffer.reuse.sampler={MINE}twice", "each at most once"),
        (f"env.reward={MINE}bare", ""),
        (f"env.reward={{kind='{MINE}success', bonsu=1.0}}", "unexpected keyword argument 'bonsu'"),
        (f"stages=['{MINE}Endless']", r"Endless is asked advance\(step\): too many positional arguments"),
        (f"stages=['{MINE}Deaf']", r"makes Deaf, which has no method begin\(learner, groups\)"),
        (f"stages=[{{kind='{MINE}Preferences', betta=1.0}}]", "unexpected keyword argument 'betta'"),
        (f"trackers=['{MINE}Deaf']", "has no on_run_start and no on_eval and no on_run_end"),
    ],
)
def test_a_part_that_does_not_fit_is_one_line_that_names_its_section(override: str, says: str) -> None:
    config = configured(override)
    if not says:
        return check_own_parts(config)
    with pytest.raises(ConfigError, match=says) as refused:
        check(config)
    assert str(refused.value).startswith(override.partition("=")[0]) and "\n" not in str(refused.value)


def test_an_estimator_is_tried_with_the_critic_that_the_run_has() -> None:
    with_critic = ("learner.algorithm.critic.kind=own",)
    check_own_parts(configured(f"learner.algorithm.advantage={MINE}monte_carlo", *with_critic))
    with pytest.raises(ConfigError, match=r"must return \(advantages, targets\) in a run with a critic"):
        check_own_parts(configured(f"learner.algorithm.advantage={MINE}leave_one_out", *with_critic))


@pytest.mark.parametrize("kind", ["mine:", ":loss", "mine:a:b", "mi ne:loss", "mine:a.b"])
def test_a_name_that_is_none_is_refused(kind: str) -> None:
    with pytest.raises(
        ConfigError, match=r'learner.algorithm.loss.kind: .* names no function; write "module:name"'
    ):
        configured(f"learner.algorithm.loss={{kind='{kind}'}}")


def test_options_of_ours_are_still_told_apart() -> None:
    with pytest.raises(ConfigError, match=r"learner.algorithm.loss.positive does not belong to kind='ppo'"):
        configured("learner.algorithm.loss.positive=1.0")
    with pytest.raises(
        ConfigError, match=r"unknown option learner.algorithm.loss.clip_hihg; did you mean .*clip_high"
    ):
        configured("learner.algorithm.loss.clip_hihg=1.0")


def test_a_regularizer_acts_on_every_token() -> None:
    with pytest.raises(
        ConfigError,
        match=r"regularizers acts on every sampled token, but .*; set skip_zero_advantage = false",
    ):
        configured(f"learner.algorithm.regularizers=['{MINE}half_square']")


def test_own_parts_travel_or_are_refused_and_are_tried_where_they_lie(tmp_path: Path) -> None:
    (tmp_path / "travelling.py").write_text(
        "def loss(logprobs_N, proximal_N, advantages_N, sequence_N, power):\n"
        "    return -logprobs_N * advantages_N, {}\n",
        encoding="utf-8",
    )

    def refusal(options: str, folder: Path | None) -> str:
        override = f"learner.algorithm.loss={{kind='travelling:loss'{options}}}"
        with pytest.raises(ConfigError) as refused:
            submit("scratch", ["env.id=arithmetic", override], "http://127.0.0.1:1", Path("/runs"), folder)
        return str(refused.value)

    assert "module travelling, which the recipe names, is not sent" in refusal("", None)
    assert "missing a required argument: 'power'" in refusal("", tmp_path)
    assert "no Ray cluster answers" in refusal(", power=2", tmp_path)
    assert str(tmp_path) not in sys.path
