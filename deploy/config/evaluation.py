"""Settings of evaluations: the run's own and its suites, and how tasks are sampled."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from rollout.episodes.evaluation import EvaluationPlan, EvaluationSampling, Majority

Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]*$")]


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SuiteSettings(_Settings):
    """A named set of tasks that is evaluated beside the run's own; what is not set is as in `evaluation`."""

    name: Name = Field(description="name of the suite, in metrics and in RUN/evaluations")
    env: str | None = Field(
        None,
        description="environment of the suite, an id or a name in envs; not set: the environment of training",
    )
    options: dict[str, Any] = Field(
        default_factory=dict,
        description="environment options; for an environment of training those that differ from its evaluation",
    )
    tasks: int | None = Field(None, gt=0, description="tasks of the suite; not set: evaluation.tasks")
    first_seed: int | None = Field(
        None, ge=0, description="seed of the first task; not set: evaluation.first_seed"
    )
    samples: int | None = Field(None, gt=0, description="episodes of each task; not set: evaluation.samples")
    sampling: EvaluationSampling | None = Field(
        None, description="sampling of the suite; not set: evaluation.sampling"
    )
    majority: Majority | None = Field(
        None, description="what the samples of a task vote with; not set: evaluation.majority"
    )


class EvaluationSettings(_Settings):
    """Evaluation before, during and after training."""

    tasks: int = Field(
        256,
        ge=0,
        description="tasks of each environment in an evaluation; 0: none but those of the suites. In "
        "environments with a train/held-out split their first observations all differ",
    )
    samples: int = Field(
        1,
        gt=0,
        description="episodes of each task. With several, pass@k is estimated and intervals are over tasks",
    )
    base: bool = Field(
        False,
        description="evaluate the model also as the stages find it, before the first of them. Without stages that is "
        "what the evaluation before training says",
    )
    every_steps: int = Field(
        0,
        ge=0,
        description="learner steps between two evaluations during training; 0: before and after only. "
        "Training goes on meanwhile; the next version is published when the evaluation has ended",
    )
    sampling: EvaluationSampling = Field(
        default_factory=EvaluationSampling, description="sampling of evaluations, as in training by default"
    )
    majority: Majority = Field(
        "none",
        description="what the samples of a task vote with in the metric maj@N. text: the last answer; number: "
        "its last number; choice: its letter; none: no vote",
    )
    timeout_seconds: float = Field(
        1800.0, gt=0, description="time limit for one evaluation of one environment, seconds"
    )
    first_seed: int = Field(0, ge=0, description="seed of the first task; the others follow")
    options: dict[str, Any] = Field(
        default_factory=dict,
        description="environment options that differ from those of training, such as {split = 'heldout'}",
    )
    suites: tuple[SuiteSettings, ...] = Field(
        (), description="further sets of tasks, each with a name, evaluated beside this one"
    )

    @property
    def evaluates(self) -> bool:
        """Whether there is anything to evaluate."""
        return bool(self.tasks or self.suites)


def prefix(suite: str) -> str:
    """What the metrics of a suite begin with; the run's own evaluation has no name."""
    return f"eval_{suite}_" if suite else "eval_"


def plans_of(evaluation: EvaluationSettings) -> dict[str, EvaluationPlan]:
    """How tasks are played, by suite: the run's own, if it has any, under the empty name, then those of each suite."""
    own = EvaluationPlan(evaluation.samples, evaluation.sampling, evaluation.majority)
    suites = {
        suite.name: EvaluationPlan(
            suite.samples or own.samples, suite.sampling or own.sampling, suite.majority or own.majority
        )
        for suite in evaluation.suites
    }
    return ({"": own} if evaluation.tasks else {}) | suites
