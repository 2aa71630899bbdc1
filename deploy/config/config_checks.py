"""Checks of a whole configuration: options that contradict one another, and options without any effect.

A check raises ValueError with one line: the options, their values, and values that would fit. An option that is risky
but valid is a warning; the run starts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from deploy.config import suites
from deploy.config.derived import longest_episode
from deploy.config.engine_checks import require_engine
from deploy.config.guards import DEFAULTS
from deploy.config.policies import require_policies
from learner.algorithm.algorithm import TurnCriticSettings
from learner.algorithm.corrections import LagMask
from learner.algorithm.estimators import ReinforceAdvantage
from learner.algorithm.schedule import learning_rate
from learner.stages.settings import RewardModelSettings
from rollout.external.external_env import PROGRAM
from rollout.wire.trajectory import EnvironmentKey
from rollout.wire.weights import PROBE_TOKENS

if TYPE_CHECKING:
    from deploy.config.config import RunConfig


def require_consistent(config: RunConfig) -> None:
    """Run every check. ValueError for the first contradiction."""
    for check in (
        _environments,
        _model,
        _sampling,
        suites.require_sound,
        _group,
        _uniform_groups,
        _discount,
        _replay,
        _routers,
        _ranks,
        _updates,
        _critic,
        _schedules,
        _reward_model,
        _corrections,
        _overlong,
        _guards,
        require_engine,
        require_policies,
    ):
        check(config)


def config_warnings(config: RunConfig) -> list[str]:
    """Warnings about valid options whose effect the user may not intend, one line each."""
    algorithm, oldest = config.learner.algorithm, _oldest(config)
    if algorithm.weighs_behavior or not (oldest or config.replay):
        return []
    which = "of the past run" if config.replay else f"up to {oldest} versions old"
    why = "proximal='learner'" if algorithm.loss.has_ratio else f"loss.kind={algorithm.loss.kind!r}"
    return [
        f"off-policy samples ({which}) are treated as on-policy: {why} without a correction of kind tis, mask or "
        "icepop has no importance weight; add one with learner.algorithm.proximal='learner' and "
        "corrections=[{kind='tis'}]"
    ]


def _oldest(config: RunConfig) -> int:
    """The largest lag of a trained token, in versions."""
    reuse = config.buffer.reuse
    return max(config.buffer.max_lag, reuse.max_lag if reuse.groups else 0)


# What is played -----------------------------------------------------------------------------------------------------


def _environments(config: RunConfig) -> None:
    if (config.env is None) == (not config.envs):
        which = "has neither" if config.env is None else "has both"
        raise ValueError(
            f"a run has one environment, [env], or several, [[envs]]; this recipe {which}. clear = ['env'] removes the "
            "section of a recipe that this one extends"
        )
    seen: dict[EnvironmentKey, str] = {}
    for each in config.environments:
        if each.name in seen.values():
            raise ValueError(
                f"{each.section}.name={each.name!r} is the name of another environment; change it"
            )
        if twice := seen.keys() & each.keys:
            raise ValueError(
                f"envs {seen[twice.pop()]!r} and {each.name!r} play the same tasks: id and options are equal, in "
                "training or evaluation; make them one entry, or change an option of one"
            )
        seen |= dict.fromkeys(each.keys, each.name)


# What is sampled ----------------------------------------------------------------------------------------------------


def _model(config: RunConfig) -> None:
    config.learner.model.require_consistent()
    if bool(config.learner.model.path) == (config.tiny is not None):
        raise ValueError(
            "set exactly one of learner.model.path (a checkpoint) and the section tiny (a small random model); the "
            "override tiny= removes the section"
        )


def _sampling(config: RunConfig) -> None:
    sampling, context = config.sampling, config.rollout.context_tokens
    if sampling.temperature == 0:
        raise ValueError(
            "sampling.temperature=0 is greedy: all episodes of a group would be the same. Use a value above 0; "
            "evaluation.sampling.temperature=0 is for evaluations"
        )
    if sampling.top_p < 1:
        raise ValueError(
            f"sampling.top_p={sampling.top_p:g} truncates the sampling distribution, but the learner computes logprobs "
            "of the whole one; use sampling.top_p=1"
        )
    if sampling.seed is not None:
        raise ValueError(
            "sampling.seed is derived for each request from the run's seed; remove it and set seed"
        )
    if context <= PROBE_TOKENS:
        raise ValueError(
            f"rollout.context_tokens={context} must exceed {PROBE_TOKENS}, the length of the probe that verifies every "
            "weight sync; raise it"
        )
    for environment in config.environments:
        most = environment.sampling.max_tokens
        if most >= context:
            section = "sampling" if most == sampling.max_tokens else environment.section
            raise ValueError(
                f"{section}.max_tokens={most} leaves no room for a prompt in rollout.context_tokens={context}; lower "
                "the former or raise the latter"
            )


# Advantages --------------------------------------------------------------------------------------------------


def _group(config: RunConfig) -> None:
    estimator, rollout, reuse = config.learner.algorithm.advantage, config.rollout, config.buffer.reuse
    if rollout.group_size < 2 and estimator.siblings:
        raise ValueError(
            f"rollout.group_size=1 leaves learner.algorithm.advantage.kind={estimator.kind!r} without a baseline: it "
            "compares the rewards of siblings; use a group of 2 or more, or the kind 'gae', 'reinforce_pp' without "
            "group_baseline, or 'returns' with baseline='batch'"
        )
    if rollout.group_size < 2 and reuse.groups and reuse.sampler.kind == "prioritized":
        raise ValueError(
            "buffer.reuse.sampler.kind='prioritized' prefers groups whose rewards differ, but "
            "rollout.group_size=1; use 2 or more, or kind 'uniform'"
        )
    if estimator.turns and all(each.limits.max_turns == 1 for each in config.environments):
        raise ValueError(
            f"learner.algorithm.advantage.kind={estimator.kind!r} compares turns, but rollout.max_turns=1; "
            "allow more turns, or use kind 'grpo'"
        )


def _uniform_groups(config: RunConfig) -> None:
    estimator = config.learner.algorithm.advantage
    if config.rollout.dynamic_sampling and config.learner.algorithm.constraints:
        raise ValueError(
            "rollout.dynamic_sampling drops groups whose episodes earn the same, but learner.algorithm.constraints "
            "needs the costs of every group; use dynamic_sampling=false"
        )
    if config.rollout.dynamic_sampling and not estimator.totals:
        raise ValueError(
            "rollout.dynamic_sampling drops groups whose episodes have equal total rewards, but "
            f"learner.algorithm.advantage.kind={estimator.kind!r} may tell such episodes apart; use "
            "dynamic_sampling=false, or kind 'grpo', 'rloo', 'maxrl', or 'reinforce_pp' with group_baseline"
        )


def _discount(config: RunConfig) -> None:
    estimator = config.learner.algorithm.advantage
    if isinstance(estimator, ReinforceAdvantage) and estimator.group_baseline and estimator.gamma != 1:
        raise ValueError(
            f"learner.algorithm.advantage.gamma={estimator.gamma:g} discounts returns of tokens, but group_baseline "
            "compares whole episodes; remove one of the two"
        )


def _replay(config: RunConfig) -> None:
    if config.replay is None:
        return
    if config.rollout.dynamic_sampling:
        raise ValueError(
            "rollout.dynamic_sampling replaces each group that it drops with a new one, but a replay plays none: use "
            "rollout.dynamic_sampling=false"
        )
    if config.learner.algorithm.constraints:
        raise ValueError(
            "learner.algorithm.constraints follows what the policy's own episodes cost, but those of a replay do not "
            "change with it; remove the constraints"
        )
    if config.buffer.reuse.groups:
        raise ValueError(
            "buffer.reuse does not act in a replay: each step takes the groups of the past run's step, reused ones "
            "included; use buffer.reuse.groups=0"
        )


# Optimization ------------------------------------------------------------------------------------------------------


def _routers(config: RunConfig) -> None:
    model = config.learner.model
    for option, off in (("router_balance", "0"), ("router_replay", "false"), ("expert_parallel", "false")):
        if config.tiny is not None and getattr(model, option):
            raise ValueError(
                f"learner.model.{option} is for a mixture of experts, which a tiny model is not; use {off}"
            )
    if model.expert_parallel and config.learner.ranks == 1:
        raise ValueError(
            "learner.model.expert_parallel divides experts over ranks, but learner.ranks=1; use more ranks, or false"
        )


def _ranks(config: RunConfig) -> None:
    ranks, groups = config.learner.ranks, config.buffer.groups_per_step
    if ranks % (together := config.learner.context_parallel_size):
        raise ValueError(
            f"learner.context_parallel_size={together} does not divide learner.ranks={ranks}: every rank computes a "
            "slice of a row; use a divisor"
        )
    if config.tiny is not None and config.tiny.heads % together:
        raise ValueError(
            f"learner.context_parallel_size={together} does not divide tiny.heads={config.tiny.heads}; use a divisor"
        )
    if (shares := config.learner.shares) > groups:
        said = f"learner.ranks={ranks}" + (f" in groups of {together}" if together > 1 else "")
        raise ValueError(
            f"{said} exceeds buffer.groups_per_step={groups}, and a group is not divided over ranks; "
            f"have at least {shares} groups a step"
        )
    if (over := config.learner.sharded_over) is not None and ranks % over:
        raise ValueError(
            f"learner.sharded_over={over} does not divide learner.ranks={ranks}: every copy of the model has as many "
            "ranks; use a divisor, or leave it out to shard over all"
        )
    if ranks > 1 and config.weights.transfer == "ipc":
        raise ValueError(
            f"weights.transfer='ipc' sends within one GPU, but learner.ranks={ranks} have one each; use 'nccl', "
            "'object_store', or learner.ranks=1"
        )


def _updates(config: RunConfig) -> None:
    learner, minibatches = config.learner, config.learner.algorithm.minibatches
    shares = learner.shares
    episodes = config.buffer.groups_per_step * config.rollout.group_size
    if minibatches > episodes // shares:
        raise ValueError(
            f"learner.algorithm.minibatches={minibatches} exceeds the episodes of a step on one rank: {episodes} "
            f"(buffer.groups_per_step * rollout.group_size) over {learner.shares_option}={shares}; use "
            f"{episodes // shares} or fewer"
        )


def _critic(config: RunConfig) -> None:
    critic = config.learner.algorithm.critic
    if critic is not None and config.steps and critic.warmup_steps >= config.steps:
        raise ValueError(
            f"learner.algorithm.critic.warmup_steps={critic.warmup_steps} leaves the policy no step of "
            f"steps={config.steps}; lower the former or raise the latter"
        )


def _schedules(config: RunConfig) -> None:
    learner, algorithm = config.learner, config.learner.algorithm
    if not config.steps and not config.stages:
        raise ValueError("steps=0 without stages leaves nothing to do; give either")
    critic = algorithm.critic if config.steps else None
    schedules = []
    if config.steps:
        schedules.append(("learner.optim", learner.optim, algorithm.policy_steps(config.steps)))
    if critic is not None:
        name = "learner.algorithm.critic.optim"
        schedules.append((name, critic.optim, algorithm.critic_steps(config.steps)))
    for place, stage in enumerate(config.stages):
        if planned := stage.planned:
            schedules.append((f"stages.{place}.optim", *planned))
    for name, optim, steps in schedules:
        try:
            learning_rate(optim, 0, steps)
        except ValueError as error:
            waits = " (none while the critic warms up)" if critic and optim is learner.optim else ""
            raise ValueError(f"{name}: {error}{waits}; lower {name}.warmup_steps or train longer") from error


def _reward_model(config: RunConfig) -> None:
    """A reward model takes the policy's place, so that nothing can be played or learned behind it."""
    places = [place for place, stage in enumerate(config.stages) if isinstance(stage, RewardModelSettings)]
    if places and (places[0] + 1 < len(config.stages) or config.steps or config.evaluation.evaluates):
        raise ValueError(
            f"stages.{places[0]} makes a reward model, which cannot play: it is the last stage of a run with steps=0 "
            "and evaluation.tasks=0; train the policy in a run of its own"
        )


# Options without effect ---------------------------------------------------------------------------------------------


def _corrections(config: RunConfig) -> None:
    if config.replay is not None:
        return  # what the past reused is as old as that run allowed
    oldest = _oldest(config)
    for part in config.learner.algorithm.corrections:
        if isinstance(part, LagMask) and part.max_lag >= oldest:
            raise ValueError(
                f"learner.algorithm.corrections of kind 'lag' with max_lag={part.max_lag} masks nothing: no token is "
                f"more than {oldest} versions old (buffer.max_lag, buffer.reuse.max_lag); remove it or lower max_lag"
            )


def _overlong(config: RunConfig) -> None:
    overlong = config.learner.algorithm.overlong
    if overlong is None or any(each.agent.parts or each.id == PROGRAM for each in config.environments):
        return  # parts and foreign agents may sample more than once a turn
    context = config.rollout.context_tokens
    most = max(
        longest_episode(each.limits.max_turns, each.sampling.max_tokens, context, each.agent)
        for each in config.environments
    )
    if overlong.tokens - overlong.margin >= most:
        raise ValueError(
            f"learner.algorithm.overlong begins after {overlong.tokens - overlong.margin} sampled tokens (tokens - "
            f"margin), but no episode has more than {most} (rollout.max_turns, sampling.max_tokens and "
            "rollout.context_tokens); lower tokens or remove the section"
        )


def _guards(config: RunConfig) -> None:
    idle = dict(_idle_metrics(config))
    for guard in config.guards:
        # The default guards are the same for every algorithm, also where it lacks their metrics.
        if guard.metric in idle and guard not in DEFAULTS:
            raise ValueError(
                f"guards: {guard.metric} is never out of bounds: {idle[guard.metric]}; remove that guard"
            )


def _idle_metrics(config: RunConfig) -> Iterator[tuple[str, str]]:
    """Metrics that this algorithm does not report, or that are constant, each with the reason."""
    algorithm = config.learner.algorithm
    if algorithm.critic is None:
        for metric in ("value", "value_error", "value_grad_norm", "value_loss", "value_skipped_step"):
            yield metric, "there is no learner.algorithm.critic"
    if not isinstance(algorithm.critic, TurnCriticSettings):
        yield "value_correlation", "learner.algorithm.critic.kind is not 'turns'"
    if algorithm.kl is None:
        yield "reference_kl", "there is no learner.algorithm.kl"
    if algorithm.distill is None:
        for metric in ("distill/kl", "distill/teacher_logprob"):
            yield metric, "there is no learner.algorithm.distill"
    elif algorithm.distill.divergence != "sampled":
        yield (
            "distill/teacher_logprob",
            f"learner.algorithm.distill.divergence={algorithm.distill.divergence!r}",
        )
    if not algorithm.corrections:
        yield "correction", "there are no learner.algorithm.corrections"
    if not config.buffer.reuse.groups and config.replay is None:
        for metric in ("groups_reused", "reused_lag_max", "reused_lag_mean"):
            yield metric, "buffer.reuse.groups=0"
    if not any(part.masks for part in algorithm.corrections):
        yield "masked_fraction", "no learner.algorithm.corrections mask"
    if not algorithm.loss.clips:
        yield "clip_fraction", f"learner.algorithm.loss.kind={algorithm.loss.kind!r} clips nothing"
    elif algorithm.proximal == "learner" and algorithm.updates == 1:
        yield "clip_fraction", "with proximal='learner' and one optimizer step on a batch every ratio is 1"
