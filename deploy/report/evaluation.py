"""The result of an evaluation: success (if the environment gives verdicts) and reward, each with an interval.

RUN/evaluation_before.json and evaluation_after.json store one each, and evaluation_base.json that of the model before
its stages, where a recipe asks for it.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from deploy.config.config_errors import ConfigError
from deploy.report.statistics import clustered_interval, majority_success, pass_at_k, wilson_interval
from rollout.buffer.failures import TooManyFailures, cause_of
from rollout.buffer.replay_store import EpisodeRow
from rollout.episodes.evaluation import EvaluationRow, pass_sizes

BASE = "base"  # the model before its stages
WHEN = (BASE, "before", "after")  # of training
FILE = "evaluation.json"  # of a folder with the rows of an evaluation


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The result of the episodes of some tasks. Episodes that failed by infrastructure are left out."""

    successes: int | None  # None: no episode has a verdict
    episodes: int
    mean_reward: float
    failed: int
    reward_interval: tuple[float, float] | None = None  # 95%, bootstrap
    held_out: bool = False  # the tasks are of a split that training cannot draw from
    environments: dict[str, Evaluation] = field(default_factory=dict)  # by name, of a run with several
    samples: int = 1  # episodes of each task
    success_interval: tuple[float, float] | None = None  # 95%, bootstrap over tasks; of several samples
    pass_at: dict[str, float] = field(default_factory=dict)  # k -> pass@k; of several samples with verdicts
    majority: float | None = None  # success of the answer that most samples of a task gave
    costs: dict[str, tuple[float, float, float]] = field(default_factory=dict)  # name -> mean, 95% interval

    @classmethod
    def of(
        cls, rows: Sequence[EpisodeRow], held_out: bool = False, samples: int = 1, voted: bool = False
    ) -> Self:
        """The result of stored episodes. TooManyFailures, with the last error, if every episode failed.

        rows: `samples` of each task, one task after another. voted: they hold answers that vote.
        """
        tasks = [rows[at : at + samples] for at in range(0, len(rows), samples)]
        return cls.of_tasks(tasks, held_out, samples, voted)

    @classmethod
    def of_tasks(
        cls,
        tasks: Sequence[Sequence[EpisodeRow]],
        held_out: bool = False,
        samples: int = 1,
        voted: bool = False,
    ) -> Self:
        """The same from the episodes of each task, at most `samples`."""
        rows = [row for task in tasks for row in task]
        sound = [row for row in rows if row.sound]
        if not sound:
            error = rows[-1].error or ""
            raise TooManyFailures(
                f"all {len(rows)} evaluation episodes failed; the last: {cause_of(error)}", error
            )
        tasks = [left for task in tasks if (left := [row for row in task if row.sound])]
        several = samples > 1
        judged = any(row.success is not None for row in sound)
        verdicts = [[bool(row.success) for row in task] for task in tasks]
        rewards = [[row.reward for row in task] for task in tasks]
        return cls(
            successes=sum(map(sum, verdicts)) if judged else None,
            episodes=len(sound),
            mean_reward=sum(map(sum, rewards)) / len(sound),
            failed=len(rows) - len(sound),
            reward_interval=clustered_interval(rewards),
            held_out=held_out,
            samples=samples,
            success_interval=clustered_interval(verdicts) if judged and several else None,
            pass_at=_pass_at(verdicts, samples) if judged and several else {},
            majority=_majority(tasks) if judged and several and voted else None,
            costs=_costs(tasks),
        )

    @staticmethod
    def of_environments(
        played: Mapping[str, Sequence[EpisodeRow]],
        held_out: Collection[str],
        samples: int = 1,
        voted: bool = False,
    ) -> Evaluation:
        """The result of all episodes of a run, and of each environment's, where there are several.

        held_out: names of the environments whose tasks are. Raises TooManyFailures as `of` does, for each.
        """
        each = {name: Evaluation.of(rows, name in held_out, samples, voted) for name, rows in played.items()}
        if len(each) == 1:
            return next(iter(each.values()))
        rows = [row for own in played.values() for row in own]
        total = Evaluation.of(rows, len(held_out) == len(played), samples, voted)
        return replace(total, environments=each)

    @property
    def success(self) -> float | None:
        """Share of the sound episodes with success; None without verdicts."""
        return None if self.successes is None else self.successes / self.episodes

    @property
    def interval(self) -> tuple[float, float] | None:
        """95% interval of the success: Wilson's, of several samples by bootstrap over tasks. None without verdicts."""
        if self.successes is None or self.success_interval is not None:
            return self.success_interval
        return wilson_interval(self.successes, self.episodes)

    def metrics(self) -> dict[str, float]:
        """The result as metrics: success, reward, pass@K, maj@N."""
        success = {} if self.success is None else {"success": self.success}
        several = {f"pass@{k}": value for k, value in self.pass_at.items()}
        voted = {} if self.majority is None else {f"maj@{self.samples}": self.majority}
        costs = {f"cost_{name}": mean for name, (mean, *_) in self.costs.items()}
        return success | {"reward": self.mean_reward} | several | voted | costs

    def __str__(self) -> str:
        lost = f", {self.failed} more failed" if self.failed else ""
        reward = said(
            "reward" if self.successes is None else "mean reward", self.mean_reward, self.reward_interval
        )
        success = "" if self.success is None else said("success", self.success, self.interval) + ", "
        shown = {name: value for name, value in self.metrics().items() if "@" in name and name != "pass@1"}
        several = "".join(f"{name} {value:.3f}, " for name, value in shown.items())
        times = f" ({self.samples} of each task)" if self.samples > 1 else ""
        costs = "".join(
            f", {said(f'cost {name}', mean, interval)}" for name, (mean, *interval) in self.costs.items()
        )
        return f"{success}{several}{reward}{costs}, {self.episodes} episodes{times}{lost}"

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Evaluation:
        """Read a stored result. ConfigError for a damaged file."""
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            each = {name: Evaluation(**own) for name, own in stored.pop("environments", {}).items()}
            return cls(**stored, environments=each)
        except (ValueError, TypeError, AttributeError) as error:
            raise ConfigError(f"{path}: broken file ({error}); remove it to continue without it") from error


def _costs(tasks: Sequence[Sequence[EpisodeRow]]) -> dict[str, tuple[float, float, float]]:
    """Mean and interval of each cost; an episode that lacks it counts 0."""
    by_task = [[row.costs for row in task if isinstance(row, EvaluationRow)] for task in tasks]
    found = {}
    for name in sorted({name for task in by_task for costs in task for name in costs}):
        values = [[costs.get(name, 0.0) for costs in task] for task in by_task]
        mean = sum(map(sum, values)) / sum(map(len, values))
        found[name] = (mean, *clustered_interval(values))
    return found


def _pass_at(verdicts: Sequence[Sequence[bool]], samples: int) -> dict[str, float]:
    """pass@k, the mean over the tasks that have k sound samples."""
    found = {}
    for k in pass_sizes(samples):
        if enough := [task for task in verdicts if len(task) >= k]:
            found[str(k)] = sum(pass_at_k(len(task), sum(task), k) for task in enough) / len(enough)
    return found


def _majority(tasks: Sequence[Sequence[EpisodeRow]]) -> float:
    votes = [
        [(row.answer, bool(row.success)) for row in task if isinstance(row, EvaluationRow)] for task in tasks
    ]
    return sum(map(majority_success, votes)) / len(votes)


def said(name: str, value: float, interval: Sequence[float] | None) -> str:
    """A number with its 95% interval, as text."""
    return f"{name} {value:.3f}" + (
        f" (95% interval {interval[0]:.3f} to {interval[1]:.3f})" if interval else ""
    )


def figures(results: Mapping[str, Evaluation]) -> dict[str, Any]:
    """Evaluations, by WHEN, as keys of summary.json: success_WHEN and reward_WHEN, each with its _interval.

    Those of an evaluation that is missing are None; of one of the base model they are left out.
    `environments` has the same of each environment by its name, in a run with several.
    If one of them has verdicts, the environment gives them, and another one without any has a success of 0.
    """
    if any(each.successes is not None for each in results.values()):
        results = {when: replace(each, successes=each.successes or 0) for when, each in results.items()}
    found: dict[str, Any] = {"held_out": any(each.held_out for each in results.values())}
    for when in WHEN:
        each = results.get(when)
        if each is None and when == BASE:
            continue
        found |= {
            f"success_{when}": each and each.success,
            f"success_{when}_interval": each and each.interval,
            f"reward_{when}": each and each.mean_reward,
            f"reward_{when}_interval": each and each.reward_interval,
        }
        for name, (mean, *interval) in each.costs.items() if each else ():
            found |= {f"cost_{name}_{when}": mean, f"cost_{name}_{when}_interval": interval}
    if parts := _by_name({when: each.environments for when, each in results.items()}):
        found["environments"] = {name: figures(each) for name, each in parts.items()}
    return found


def _by_name(results: Mapping[str, Mapping[str, Evaluation]]) -> dict[str, dict[str, Evaluation]]:
    """From evaluations by WHEN and name to those by name and WHEN."""
    names = dict.fromkeys(name for named in results.values() for name in named)
    return {name: {when: named[name] for when, named in results.items() if name in named} for name in names}


def summary_of(results: Mapping[str, Mapping[str, Evaluation]]) -> dict[str, Any]:
    """The results of a run, by WHEN and suite, as keys of summary.json: those of `figures`, and of each suite."""
    by_suite = _by_name(results)
    own = figures(by_suite.pop("", {}))
    return own | ({"suites": {name: figures(each) for name, each in by_suite.items()}} if by_suite else {})


def stored_figures(run_folder: Path) -> dict[str, Any]:
    """The results of the evaluations that an unfinished run has made so far."""
    paths = {when: run_folder / f"evaluation_{when}.json" for when in WHEN}
    return figures({when: Evaluation.load(path) for when, path in paths.items() if path.is_file()})
