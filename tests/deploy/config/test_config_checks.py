"""What contradicts itself or could never act is refused in one line, and what that line recommends is accepted."""

from __future__ import annotations

import re

import pytest

from deploy.config.config import RunConfig
from deploy.config.config_checks import config_warnings
from deploy.config.config_errors import ConfigError
from deploy.config.load import load_config
from tests.deploy.small_run import configured

ADVANTAGE = "learner.algorithm.advantage="
CORRECTIONS = "learner.algorithm.corrections="
CRITIC = ("learner.algorithm.advantage.kind=gae", "learner.algorithm.critic.kind=own")
ALONE = "rollout.group_size=1"
UNIFORM = "rollout.dynamic_sampling=true"
LIMITED = "learner.algorithm.constraints=[{name='risk', limit=1, update={kind='dual', rate=1}}]"
REUSE = ("buffer.reuse.groups=1", "buffer.reuse.max_lag=3")
FLOAT8 = ("learner.model.float8=true", "learner.model.dtype=bfloat16")
FREE = ("learner.algorithm.loss.kind=reinforce",)


def suites(said: str) -> str:
    return f"evaluation.suites=[{said}]"


def guard(metric: str) -> str:
    return f"guards=[{{metric='{metric}', above=0.1}}]"


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ([ALONE, ADVANTAGE + "{kind='returns'}"], "rollout.group_size=1 leaves .*'returns' without a baseline"),
        ([ALONE, ADVANTAGE + "{kind='reinforce_pp', group_baseline=true}"], "'reinforce_pp' without group_baseline"),
        ([ADVANTAGE + "{kind='reinforce_pp', group_baseline=true, gamma=0.9}"], "gamma=0.9 discounts returns of"),
        ([ALONE, UNIFORM], "rollout.group_size=1 leaves"),
        (["learner.model.float8=true"], "learner.model.dtype, now 'float32', to 'bfloat16'"),
        ([*FLOAT8, "learner.model.lora={}"], "leave out learner.model.lora, or set float8=false"),
        ([ALONE, UNIFORM, ADVANTAGE + "{kind='reinforce_pp'}"], "rollout.dynamic_sampling .*'reinforce_pp'"),
        ([UNIFORM, ADVANTAGE + "{kind='gdpo', weights={goal=1.0}}"], "may tell such episodes apart; .*'maxrl'"),
        ([UNIFORM, ADVANTAGE + "{kind='gigpo'}"], "rollout.dynamic_sampling"),
        ([UNIFORM, ADVANTAGE + "{kind='returns'}"], "rollout.dynamic_sampling"),
        ([UNIFORM, *CRITIC], "rollout.dynamic_sampling"),
        ([*CRITIC, "learner.algorithm.critic.warmup_steps=4"], "warmup_steps=4 leaves the policy no step of steps=4"),
        (
            [*CRITIC, "learner.algorithm.critic.warmup_steps=3", "learner.optim.schedule=linear",
             "learner.optim.warmup_steps=1"],
            "to the last one, 1: .*none while the critic warms up",
        ),
        (["learner.algorithm.minibatches=9"], "minibatches=9 .*; use 8 or fewer"),
        (["learner.algorithm.minibatches=5", "learner.ranks=2"], "minibatches=5 .*; use 4 or fewer"),
        (["buffer.max_lag=1", CORRECTIONS + "[{kind='lag', max_lag=1}]"], "masks nothing: .* than 1 versions"),
        ([*REUSE, CORRECTIONS + "[{kind='lag', max_lag=3}]"], "masks nothing: .* than 3 versions"),
        (["learner.algorithm.overlong={tokens=231, margin=31}"], "begins after 200 .* no episode has more than 200"),
        (["learner.algorithm.overlong={tokens=50, margin=10}", "agent.memory=full"], "no episode has more than 40"),
        ([ADVANTAGE + "{kind='gigpo', weight=0.0}"], "advantage.weight: Input should be greater than 0"),
        ([guard("value_error")], "value_error is never out of bounds: there is no learner.algorithm.critic"),
        ([guard("reference_kl")], "there is no learner.algorithm.kl"),
        ([guard("value_skipped_step")], "there is no learner.algorithm.critic"),
        ([guard("correction")], "there are no learner.algorithm.corrections"),
        ([guard("reused_lag_max")], "buffer.reuse.groups=0"),
        ([guard("masked_fraction")], "no learner.algorithm.corrections mask"),
        ([guard("clip_fraction"), *FREE], "loss.kind='reinforce' clips nothing"),
        ([guard("clip_fraction"), "learner.algorithm.loss.kind=sapo"], "'sapo' clips nothing"),
        ([guard("clip_fraction"), "learner.algorithm.proximal=learner"], "every ratio is 1"),
        (["sampling.temperature=0"], "sampling.temperature=0 is greedy"),
        (["evaluation={tasks=0, every_steps=2}"], "every_steps=2, but nothing is evaluated"),
        (["evaluation={samples=4, sampling={temperature=0}}"], "samples=4 of a greedy sampling"),
        (["evaluation.majority=number"], "majority='number' needs several samples"),
        (["evaluation.sampling.max_tokens=40"], "evaluation: max_tokens=40 leaves no room"),
        ([suites("{name='hard', samples=2, majority='text'}, {name='hard'}")], "the name 'hard' is taken"),
        ([suites("{name='before'}")], "the name 'before' is taken"),
        (["evaluation.tasks=0", suites("{name='hard'}")], "suite 'hard' has no tasks"),
        (["checkpoint.best_metric=success"], "best_metric='success' is no metric .* eval_success, eval_reward"),
        (["checkpoint.best_metric='eval_pass@4'"], "'eval_pass@4' is no metric"),
        ([UNIFORM, LIMITED], "drops groups whose episodes earn the same, but learner.algorithm.constraints"),
        (["replay=somewhere", LIMITED], "those of a replay do not change with it; remove the constraints"),
        (["replay=somewhere", UNIFORM], "a replay plays none: use rollout.dynamic_sampling=false"),
        (["replay=somewhere", *REUSE], "buffer.reuse does not act in a replay"),
    ],
)  # fmt: skip
def test_what_would_never_act_is_refused(overrides: list[str], named: str) -> None:
    with pytest.raises(ConfigError, match=named) as caught:
        configured(*overrides)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "overrides",
    [
        [ALONE, ADVANTAGE + "{kind='returns', baseline='batch'}"],
        [ALONE, ADVANTAGE + "{kind='reinforce_pp'}"],
        ["evaluation={samples=4, every_steps=2}", "checkpoint.best_metric='eval_pass@4'"],
        [
            "evaluation.sampling.temperature=0",
            suites("{name='hard', samples=4, majority='text', sampling={temperature=0.5}}"),
            "checkpoint.best_metric='eval_hard_maj@4'",
        ],
        [ALONE, *CRITIC],
        [*FLOAT8],
        [UNIFORM],
        [UNIFORM, ADVANTAGE + "{kind='rloo'}"],
        [UNIFORM, ADVANTAGE + "{kind='maxrl'}"],
        [UNIFORM, ADVANTAGE + "{kind='reinforce_pp', group_baseline=true}"],
        [*CRITIC, "learner.algorithm.critic.warmup_steps=3", guard("value_error")],
        ["learner.algorithm.minibatches=8"],
        [*REUSE, CORRECTIONS + "[{kind='lag', max_lag=2}]", guard("masked_fraction")],
        ["replay=somewhere", CORRECTIONS + "[{kind='lag', max_lag=2}]"],  # the past may have reused
        ["learner.algorithm.overlong={tokens=231, margin=32}"],
        ["learner.algorithm.proximal=learner", "learner.algorithm.epochs=2", guard("clip_fraction")],
    ],
)
def test_what_the_refusals_recommend_is_accepted(overrides: list[str]) -> None:
    configured(*overrides)


def test_guards_that_nobody_wrote_refuse_nothing_when_a_run_is_opened_again() -> None:
    config = configured(*FREE)
    assert any(one.metric == "clip_fraction" for one in config.guards)
    assert RunConfig.model_validate_json(config.model_dump_json()) == config


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["buffer.max_lag=2", *FREE],
            r"off-policy samples \(up to 2 versions old\) are treated as on-policy: .*loss.kind='reinforce'",
        ),
        (
            [*REUSE, "learner.algorithm.proximal=learner"],
            r"off-policy samples \(up to 3 versions old\) .*proximal='learner'",
        ),
        (["replay=somewhere", *FREE], r"off-policy samples \(of the past run\) are treated as on-policy"),
    ],
)
def test_what_ignores_who_sampled_is_doubted(overrides: list[str], said: str) -> None:
    (doubt,) = config_warnings(configured(*overrides))
    assert re.match(said, doubt) and "\n" not in doubt
    weighed = ["learner.algorithm.proximal=learner", CORRECTIONS + "[{kind='tis'}]"]
    assert config_warnings(configured(*overrides, *weighed)) == [], "what it recommends"


def test_shipped_recipes_raise_no_doubt_and_neither_does_what_is_always_on_policy() -> None:
    assert config_warnings(configured(*FREE)) == []
    assert [
        config_warnings(load_config(name)) for name in ("frozen_lake", "rloo", "ppo", "cispo", "gspo")
    ] == [[]] * 5
