"""The suites of a run's evaluations: their environments, the metrics that come of them, and what contradicts itself."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from deploy.config.environments import Environment, EnvSettings, environment_named
from deploy.config.evaluation import plans_of, prefix
from rollout.episodes.evaluation import EvaluationPlan, pass_sizes, require_differing

if TYPE_CHECKING:
    from deploy.config.config import RunConfig

_TAKEN = ("base", "before", "after", "tensorboard")  # what RUN/evaluations holds beside suites


def suite_environment(config: RunConfig, place: int) -> Environment:
    """The environment of a suite: one of the run with other options, or another one under the run's settings."""
    suite, section = config.evaluation.suites[place], f"evaluation.suites.{place}"
    known = config.environments[0] if suite.env is None else environment_named(config.environments, suite.env)
    if known is not None:
        options = known.evaluation_options | suite.options
        return replace(known, evaluation_section=f"{section}.options", evaluation_options=options)
    assert suite.env is not None
    return Environment(
        section=section,
        name=suite.name,
        share=1.0,
        settings=EnvSettings(id=suite.env),
        evaluation_section=f"{section}.options",
        evaluation_options=suite.options,
        agent_section="agent",
        agent=config.agent,
        sampling=config.sampling,
        limits=config.rollout.limits,
    )


def all_environments(config: RunConfig) -> list[Environment]:
    """The environments that a run trains on, then those of its suites."""
    suites = range(len(config.evaluation.suites))
    return [*config.environments, *(suite_environment(config, place) for place in suites)]


def metric_names(config: RunConfig) -> list[str]:
    """The metrics of a run's evaluations; success, pass@k and maj@N only where the environment gives verdicts."""
    names = []
    environments = [each.name for each in config.environments]
    for suite, plan in plans_of(config.evaluation).items():
        several = [f"pass@{k}" for k in pass_sizes(plan.samples)] if plan.samples > 1 else []
        voted = [f"maj@{plan.samples}"] if plan.samples > 1 and plan.majority != "none" else []
        each = environments if not suite and len(environments) > 1 else []
        for of in (suite, *each):
            names += [prefix(of) + metric for metric in ("success", "reward", *several, *voted)]
    return names


def require_sound(config: RunConfig) -> None:
    """ValueError, one line, for an evaluation whose options contradict one another or have no effect."""
    evaluation, best = config.evaluation, config.checkpoint.best_metric
    environments = [each.name for each in config.environments]
    if evaluation.every_steps and not evaluation.evaluates:
        raise ValueError(
            f"evaluation.every_steps={evaluation.every_steps}, but nothing is evaluated: evaluation.tasks=0 and no "
            "suites"
        )
    if evaluation.base and not (config.stages and evaluation.evaluates):
        why = "nothing is evaluated" if config.stages else "there are none"
        raise ValueError(f"evaluation.base=true evaluates the model before its stages, but {why}; remove it")
    names = [suite.name for suite in evaluation.suites]
    for suite in evaluation.suites:
        taken = suite.name in (*_TAKEN, *environments) or suite.name.startswith("step-")
        if taken or names.count(suite.name) > 1:
            raise ValueError(f"evaluation.suites: the name {suite.name!r} is taken; choose another")
        if not (suite.tasks or evaluation.tasks):
            raise ValueError(f"evaluation suite {suite.name!r} has no tasks: evaluation.tasks=0; set its own")
        if suite.env is None and len(environments) > 1:
            raise ValueError(
                f"evaluation suite {suite.name!r}: set env, as the run has several: {', '.join(environments)}"
            )
    for name, plan in plans_of(evaluation).items():
        try:
            _require_sound(plan, config.rollout.context_tokens)
        except ValueError as error:
            raise ValueError(
                f"evaluation suite {name!r}: {error}" if name else f"evaluation: {error}"
            ) from None
    if best and best not in (known := metric_names(config)):
        raise ValueError(
            f"checkpoint.best_metric={best!r} is no metric of the evaluations; they give "
            f"{', '.join(known) or 'none, as there are none'}"
        )


def _require_sound(plan: EvaluationPlan, context: int) -> None:
    require_differing(plan.samples, plan.sampling.temperature)
    if plan.majority != "none" and plan.samples == 1:
        raise ValueError(f"majority={plan.majority!r} needs several samples, but samples=1")
    most = plan.sampling.max_tokens or 0
    if most >= context:
        raise ValueError(f"max_tokens={most} leaves no room for a prompt in rollout.context_tokens={context}")
