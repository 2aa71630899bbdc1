"""The evaluations of a run: its own tasks and those of its suites, with their environments and sampling."""

from __future__ import annotations

from dataclasses import dataclass

from deploy.assembly.build import distinct_tasks, held_out
from deploy.config.config import RunConfig
from deploy.config.environments import Environment
from deploy.config.evaluation import plans_of
from deploy.config.suites import suite_environment
from rollout.episodes.evaluation import EvaluationPlan
from rollout.wire.trajectory import Task


@dataclass(frozen=True, slots=True)
class TaskSet:
    """The tasks of one environment in a suite."""

    environment: Environment
    first_seed: int
    count: int
    held_out: bool  # of a split that training does not draw from, or of another environment

    def tasks(self) -> list[Task]:
        """The first seeds with different first observations, see `distinct_tasks`. ConfigError for too many."""
        each = self.environment
        return distinct_tasks(each.id, each.evaluated, self.first_seed, self.count, each.host)


@dataclass(frozen=True, slots=True)
class Suite:
    """What is evaluated at once, and how: the run's own evaluation has the tasks of all its environments."""

    name: str  # empty: the run's own evaluation
    plan: EvaluationPlan
    sets: tuple[TaskSet, ...]

    def folder(self, when: str) -> str:
        """Where its rows lie within RUN/evaluations."""
        return f"{self.name}/{when}" if self.name else when


def suites_of(config: RunConfig) -> list[Suite]:
    """The run's own evaluation, if it has one, and its suites."""
    evaluation = config.evaluation
    plans = plans_of(evaluation)
    suites = []
    if evaluation.tasks:
        first, count = evaluation.first_seed, evaluation.tasks
        own = tuple(TaskSet(each, first, count, held_out(each)) for each in config.environments)
        suites.append(Suite("", plans[""], own))
    for place, suite in enumerate(evaluation.suites):
        environment = suite_environment(config, place)
        first = evaluation.first_seed if suite.first_seed is None else suite.first_seed
        trained = environment.section in [of.section for of in config.environments]
        apart = not trained or held_out(environment)
        tasks = TaskSet(environment, first, suite.tasks or evaluation.tasks, apart)
        suites.append(Suite(suite.name, plans[suite.name], (tasks,)))
    return suites
