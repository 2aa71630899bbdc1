"""The policies of a run: one, or several that learn at once, `[policies.NAME]`, each from its own share of the groups.

Each policy is trained under a configuration of its own: that of the run with the policy's changes (`of_policy`).
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from pydantic import ValidationError

from deploy.config.config import RunConfig
from deploy.config.config_errors import ConfigError, explain
from deploy.config.environments import Environment
from deploy.config.policy_settings import PolicySettings
from deploy.config.recipe_files import merged
from envs import registry
from rollout.engines.engine import derive_seed
from rollout.external.external_env import PROGRAM
from rollout.wire.policies import POLICY


def of_policy(config: RunConfig, name: str) -> RunConfig:
    """The configuration that one of several policies is trained under. ConfigError, one line, if it is wrong.

    The first policy has the run's seed, and the others have seeds derived from it.
    """
    settings: PolicySettings = config.policies[name]
    names = list(config.policies)
    tree = merged(config.model_dump(mode="json"), settings.changes)
    if settings.learner.get("model", {}).get("path") and not settings.tiny:
        tree["tiny"] = None
    if settings.stages is not None:
        tree["stages"] = list(settings.stages)
    place = names.index(name)
    tree |= {"policy": name, "seed": derive_seed(config.seed, place) % 2**31 if place else config.seed}
    share = _share(config, name)
    if "groups_per_step" not in settings.buffer:
        tree["buffer"]["groups_per_step"] = _whole_groups(config, name, share)
    copy = config.buffer.copy_to
    if copy not in ("auto", "run") and "copy_to" not in settings.buffer:  # each has a copy of its own
        tree["buffer"]["copy_to"] = f"{copy.rstrip('/')}/{name}"
    if "concurrent_groups" not in settings.rollout:
        tree["rollout"]["concurrent_groups"] = max(1, round(config.rollout.concurrent_groups * share))
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        faults = [f"policies.{name}.{explain(fault, RunConfig)}" for fault in error.errors()]
        raise ConfigError("; ".join(faults)) from None


def is_several(config: RunConfig) -> bool:
    """Whether a run has several policies; False for the configuration of one of them, too."""
    return bool(config.policies) and config.policy not in config.policies


def configurations(config: RunConfig) -> dict[str, RunConfig]:
    """The configuration of each of a run's policies by its name; its own, where it has one."""
    if not is_several(config):
        return {config.policy: config}
    return {name: of_policy(config, name) for name in config.policies}


def opponents_of(config: RunConfig) -> tuple[str, ...]:
    """Names of the policies that play the other seat in games of the policy of this configuration."""
    if not config.policies:
        return (config.policy,)
    settings = config.policies[config.policy]
    named = settings.opponents
    return tuple(each for each in config.policies if each != config.policy) if named is None else named


def require_policies(config: RunConfig) -> None:
    """Check the policies of a run, and who plays the other seats. ValueError for the first contradiction."""
    league = config.league
    if (league is not None or config.policies) and config.weights.transfer != "object_store":
        raise ValueError(
            f"weights.transfer={config.weights.transfer!r} keeps no past versions and joins engines to one learner; "
            "with the sections league or policies use object_store"
        )
    for each in config.environments:
        if each.options.get("opponent") == registry.PLAYED_BY_POLICY and league is None and config.steps:
            raise ValueError(
                f"{each.section}.options.opponent='policy' is played by policies of the run; add the section league"
            )
        if each.evaluated.get("opponent") == registry.PLAYED_BY_POLICY and config.evaluation.tasks:
            raise ValueError(
                f"{each.evaluation_section}: an evaluation has no opponents of the run; set "
                "evaluation.options.opponent to another one, or evaluation.tasks=0"
            )
    if is_several(config):
        _require_several(config)
        for own in configurations(config).values():
            require_policies(own)
    if league is not None and (is_several(config) or not config.policies):
        _require_met([each for own in configurations(config).values() for each in own.environments])


def _require_met(environments: Sequence[Environment]) -> None:
    """Require an environment in which the other seat may be a policy's. ValueError names one."""
    if any(each.id != PROGRAM and registry.may_meet_policy(each.id, each.options) for each in environments):
        return
    first = environments[0]
    given = first.options.get("opponent")
    said = "" if given is None else f" with {first.section}.options.opponent={given!r}"
    raise ValueError(
        f"the section league has no effect: {first.section}.id={first.id!r}{said} never meets a past version; set "
        f"{first.section}.options.opponent='policy' in a game that has it (locks, pettingzoo/..., textarena/...), or "
        "remove the section"
    )


def _require_several(config: RunConfig) -> None:
    if config.policy != POLICY:
        raise ValueError(
            f"policy={config.policy!r} names the only policy of a run, but there are several in policies; remove it"
        )
    if config.replay is not None:
        raise ValueError("replay trains one policy on the groups of a past run; remove policies")
    if config.checkpoint.keep < 2:
        raise ValueError(
            f"checkpoint.keep={config.checkpoint.keep} may leave several policies without a version that all of them "
            "have; use 2 or more"
        )
    for name, own in config.policies.items():
        for other in own.opponents or ():
            if other not in config.policies:
                known = ", ".join(config.policies)
                raise ValueError(f"policies.{name}.opponents names {other!r}; the run's policies: {known}")
        if own.opponents is not None and config.league is None:
            raise ValueError(f"policies.{name}.opponents has no effect without the section league; add it")
        if config.league is not None and not opponents_of(of_policy(config, name)):
            raise ValueError(f"policies.{name} has no opponents; name some in policies.{name}.opponents")


def _share(config: RunConfig, name: str) -> Fraction:
    shares = {each: Fraction(repr(float(settings.share))) for each, settings in config.policies.items()}
    return shares[name] / sum(shares.values())


def _whole_groups(config: RunConfig, name: str, share: Fraction) -> int:
    groups = config.buffer.groups_per_step * share
    if groups.denominator != 1:
        raise ConfigError(
            f"policies.{name}.share gives it {float(groups):g} of buffer.groups_per_step="
            f"{config.buffer.groups_per_step} groups, which is no whole number; change the shares, or set "
            f"policies.{name}.buffer.groups_per_step"
        )
    return int(groups)
