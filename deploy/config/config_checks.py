"""Settings that contradict one another, or of which one could never act: a line for each, saying what would fit.

A check reads a whole configuration and raises ValueError. What is unwise but means something is a doubt: it is said,
and the run begins.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from deploy.config.derived import longest_episode
from deploy.config.guards import DEFAULTS
from learner.algorithm.corrections import LagMask
from learner.algorithm.estimators import ReinforceAdvantage
from learner.algorithm.schedule import learning_rate
from rollout.external.external_env import PROGRAM
from rollout.wire.weights import PROBE_TOKENS

if TYPE_CHECKING:
    from deploy.config.config import RunConfig


def require_consistent(config: RunConfig) -> None:
    """Make every check below."""
    for check in (
        _model,
        _sampling,
        _group,
        _uniform_groups,
        _discount,
        _replay,
        _ranks,
        _updates,
        _critic,
        _schedules,
        _corrections,
        _overlong,
        _guards,
        _adapters,
        _transfer,
    ):
        check(config)


def config_warnings(config: RunConfig) -> list[str]:
    """What a run does as it was told, and its owner may not have meant."""
    algorithm, oldest = config.learner.algorithm, _oldest(config)
    if algorithm.weighs_behavior or not (oldest or config.replay):
        return []
    who = "the past run" if config.replay else f"weights up to {oldest} versions old"
    why = "proximal='learner'" if algorithm.loss.has_ratio else f"loss.kind={algorithm.loss.kind!r}"
    return [
        f"what {who} sampled counts as the learner's own: {why} without a correction of kind tis, mask or icepop does "
        "not ask whose it is; consider learner.algorithm.proximal='learner' and corrections=[{kind='tis'}]"
    ]


def _oldest(config: RunConfig) -> int:
    """Versions that a trained token may be behind."""
    reuse = config.buffer.reuse
    return max(config.buffer.max_lag, reuse.max_lag if reuse.groups else 0)


# What is sampled ----------------------------------------------------------------------------------------------------


def _model(config: RunConfig) -> None:
    if bool(config.learner.model.path) == (config.tiny is not None):
        raise ValueError(
            "give exactly one of learner.model.path (a checkpoint) and the section tiny (one is built; tiny= "
            "leaves it out)"
        )


def _sampling(config: RunConfig) -> None:
    sampling, context = config.sampling, config.rollout.context_tokens
    if sampling.top_p < 1:
        raise ValueError(
            "sampling.top_p<1 changes what can be sampled, and the learner's logprobs would be of another "
            "distribution; use sampling.top_p=1"
        )
    if sampling.seed is not None:
        raise ValueError(
            "sampling.seed is one request's seed, which the run derives from its own: leave it away and set seed"
        )
    if context <= PROBE_TOKENS:
        raise ValueError(
            f"rollout.context_tokens={context} must exceed {PROBE_TOKENS}, the length of the probe that proves every "
            "weight sync"
        )
    if sampling.max_tokens >= context:
        raise ValueError(
            f"sampling.max_tokens={sampling.max_tokens} leaves no room for a prompt in "
            f"rollout.context_tokens={context}"
        )


# Who deserves what --------------------------------------------------------------------------------------------------


def _group(config: RunConfig) -> None:
    estimator, rollout, reuse = config.learner.algorithm.advantage, config.rollout, config.buffer.reuse
    if rollout.group_size < 2 and estimator.siblings:
        raise ValueError(
            f"rollout.group_size=1 leaves learner.algorithm.advantage.kind={estimator.kind!r} without a baseline: an "
            "advantage is a reward compared with its siblings'; use 2 or more, or the kind 'gae', 'reinforce_pp' "
            "without group_baseline, or 'returns' with baseline='batch'"
        )
    if rollout.group_size < 2 and reuse.groups and reuse.sampler.kind == "prioritized":
        raise ValueError(
            "buffer.reuse.sampler.kind='prioritized' prefers groups whose rewards differ, but "
            "rollout.group_size=1: use 2 or more, or 'uniform'"
        )
    if rollout.max_turns == 1 and estimator.turns:
        raise ValueError(
            f"learner.algorithm.advantage.kind={estimator.kind!r} compares turns, but rollout.max_turns=1; "
            "allow more turns, or use kind = 'grpo'"
        )


def _uniform_groups(config: RunConfig) -> None:
    estimator = config.learner.algorithm.advantage
    if config.rollout.dynamic_sampling and not estimator.totals:
        raise ValueError(
            "rollout.dynamic_sampling drops groups whose episodes earned the same in all, but "
            f"learner.algorithm.advantage.kind={estimator.kind!r} may tell such episodes apart; use "
            "dynamic_sampling=false, or kind 'grpo', 'rloo', 'maxrl', or 'reinforce_pp' with group_baseline"
        )


def _discount(config: RunConfig) -> None:
    estimator = config.learner.algorithm.advantage
    if isinstance(estimator, ReinforceAdvantage) and estimator.group_baseline and estimator.gamma != 1:
        raise ValueError(
            f"learner.algorithm.advantage.gamma={estimator.gamma:g} discounts returns of tokens, and group_baseline "
            "compares whole episodes: leave one of the two away"
        )


def _replay(config: RunConfig) -> None:
    if config.replay is None:
        return
    if config.rollout.dynamic_sampling:
        raise ValueError(
            "rollout.dynamic_sampling plays another group for one that it drops, and a replay plays none: use "
            "rollout.dynamic_sampling=false"
        )
    if config.buffer.reuse.groups:
        raise ValueError(
            "buffer.reuse does not act in a replay, whose every step has the groups of the past one, reused ones too: "
            "use buffer.reuse.groups=0"
        )


# How it is learned --------------------------------------------------------------------------------------------------


def _ranks(config: RunConfig) -> None:
    ranks, groups = config.learner.ranks, config.buffer.groups_per_step
    if ranks > groups:
        raise ValueError(
            f"learner.ranks={ranks} share the groups of a step, but buffer.groups_per_step={groups}: a group is "
            "not divided; have at least as many groups as ranks"
        )
    if ranks > 1 and config.learner.model.lora is not None:
        raise ValueError(
            f"learner.model.lora trains an adapter in one process, but learner.ranks={ranks}; use learner.ranks=1"
        )
    if ranks > 1 and config.weights.transfer != "object_store":
        raise ValueError(
            f"weights.transfer={config.weights.transfer!r} sends from one process, but learner.ranks={ranks}; "
            "use 'object_store', or learner.ranks=1"
        )


def _updates(config: RunConfig) -> None:
    minibatches, ranks = config.learner.algorithm.minibatches, config.learner.ranks
    episodes = config.buffer.groups_per_step * config.rollout.group_size
    if minibatches > episodes // ranks:
        raise ValueError(
            f"learner.algorithm.minibatches={minibatches} divide the episodes of a step, but there are {episodes} "
            f"(buffer.groups_per_step * rollout.group_size) for learner.ranks={ranks}; use {episodes // ranks} or fewer"
        )


def _critic(config: RunConfig) -> None:
    critic = config.learner.algorithm.critic
    if critic is not None and critic.warmup_steps >= config.steps:
        raise ValueError(
            f"learner.algorithm.critic.warmup_steps={critic.warmup_steps} are steps in which the policy stays, and "
            f"steps={config.steps}: it would never learn; lower them or train longer"
        )


def _schedules(config: RunConfig) -> None:
    learner, algorithm = config.learner, config.learner.algorithm
    schedules = [("learner.optim", learner.optim, algorithm.policy_steps(config.steps))]
    if (critic := algorithm.critic) is not None:
        name = "learner.algorithm.critic.optim"
        schedules.append((name, critic.optim, config.steps * algorithm.updates))
    if config.warm_start:
        steps = learner.imitation.steps(config.warm_start.episodes)
        schedules.append(("learner.imitation.optim", learner.imitation.optim, steps))
    for name, optim, steps in schedules:
        try:
            learning_rate(optim, 0, steps)
        except ValueError as error:
            waits = " (none while the critic warms up)" if critic and optim is learner.optim else ""
            raise ValueError(f"{name}: {error}{waits}; lower {name}.warmup_steps or train longer") from error


# What would never act -----------------------------------------------------------------------------------------------


def _corrections(config: RunConfig) -> None:
    if config.replay is not None:
        return  # what the past reused is as old as that run allowed
    oldest = _oldest(config)
    for part in config.learner.algorithm.corrections:
        if isinstance(part, LagMask) and part.max_lag >= oldest:
            raise ValueError(
                f"learner.algorithm.corrections of kind 'lag' with max_lag={part.max_lag} masks nothing: no token is "
                f"more than {oldest} versions old (buffer.max_lag, buffer.reuse.max_lag); leave it away or lower it"
            )


def _overlong(config: RunConfig) -> None:
    overlong = config.learner.algorithm.overlong
    if overlong is None or config.agent.parts or config.env.id == PROGRAM:
        return  # parts and foreign agents may sample more than once a turn
    most = longest_episode(config.rollout, config.sampling, config.agent)
    if overlong.tokens - overlong.margin >= most:
        raise ValueError(
            f"learner.algorithm.overlong begins after {overlong.tokens - overlong.margin} sampled tokens (tokens - "
            f"margin), but no episode has more than {most} (rollout.max_turns, sampling.max_tokens and "
            "rollout.context_tokens); lower tokens or leave the section away"
        )


def _guards(config: RunConfig) -> None:
    idle = dict(_idle_metrics(config))
    for guard in config.guards:
        # Those of the default belong to every algorithm, whatever it does not say.
        if guard.metric in idle and guard not in DEFAULTS:
            raise ValueError(
                f"guards: {guard.metric} is never out of bounds: {idle[guard.metric]}; leave that guard away"
            )


def _idle_metrics(config: RunConfig) -> Iterator[tuple[str, str]]:
    """Metrics that this algorithm does not have, or that never move, each with the reason."""
    algorithm = config.learner.algorithm
    if algorithm.critic is None:
        for metric in ("value", "value_error", "value_grad_norm", "value_loss", "value_skipped_step"):
            yield metric, "there is no learner.algorithm.critic"
    if algorithm.kl is None:
        yield "reference_kl", "there is no learner.algorithm.kl"
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


# How weights travel -------------------------------------------------------------------------------------------------


def _adapters(config: RunConfig) -> None:
    lora = config.learner.model.lora
    if lora is None or lora.sync == "merged":
        return
    if config.weights.transfer != "object_store":
        raise ValueError(
            f"learner.model.lora.sync='adapter' does not travel by weights.transfer={config.weights.transfer!r}, "
            "which sends whole weights; use 'object_store', or sync='merged'"
        )
    halves = config.engine.placement.half_adapters and config.engine.dtype == "float32"
    if config.rollout.gpus_per_worker and halves:
        raise ValueError(
            "learner.model.lora.sync='adapter' needs engine.dtype='bfloat16' or 'float16' on GPUs, where vLLM "
            "multiplies adapters in half precision only; set it, or use sync='merged'"
        )


def _transfer(config: RunConfig) -> None:
    transfer, gpus = config.weights.transfer, config.rollout.gpus_per_worker
    placement = config.engine.placement
    if unfit := placement.unfit(gpus):
        raise ValueError(f"engine.kind={config.engine.kind!r}: {unfit}")
    if transfer not in placement.transfers:
        raise ValueError(
            f"weights.transfer={transfer!r} does not reach engine.kind={config.engine.kind!r}; use 'object_store'"
        )
    if transfer == "object_store":
        return
    if not gpus:
        raise ValueError(
            f"weights.transfer={transfer!r} needs GPUs, but rollout.gpus_per_worker=0; "
            "use 'object_store' or give the workers a GPU"
        )
    if config.learner.model.device != "cuda":
        raise ValueError(
            f"weights.transfer={transfer!r} sends from the learner's GPU, but learner.model.device='cpu'; "
            "use 'object_store' or train on 'cuda'"
        )
    if transfer == "nccl" and gpus < placement.gpus:
        raise ValueError(
            f"weights.transfer='nccl' needs whole GPUs, but rollout.gpus_per_worker={gpus:g} for "
            f"engine.tensor_parallel_size={placement.gpus}; give a worker as many as it spans"
        )
    if transfer == "ipc" and (config.rollout.workers * gpus >= 1 or placement.gpus > 1):
        raise ValueError(
            "weights.transfer='ipc' needs engines of one GPU each that share the learner's: keep rollout.workers * "
            "rollout.gpus_per_worker below 1 and engine.tensor_parallel_size at 1, or use 'nccl'"
        )
