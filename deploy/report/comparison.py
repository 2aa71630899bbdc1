"""Stored evaluations read back, and two of them compared task by task."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from deploy.config.config_errors import ConfigError
from deploy.report.episodes import Spans
from deploy.report.evaluation import Evaluation
from deploy.report.statistics import clustered_interval, mcnemar
from rollout.buffer.segments import read_rows, segment_files
from rollout.episodes.evaluation import EvaluationRow, Majority, vote
from rollout.wire.trajectory import EndReason

TaskKey = tuple[str, str, int]  # environment, its options, seed
Tasks = Mapping[TaskKey, Sequence[EvaluationRow]]  # the stored samples of each task
FILE = "comparison.json"


def is_stored(folder: Path) -> bool:
    """Whether a folder holds the rows of an evaluation."""
    return folder.is_dir() and bool(segment_files(folder))


def stored_tasks(folder: Path, majority: Majority = "none") -> Tasks:
    """The outcomes of a stored evaluation by task. An episode that failed before its first turn has none."""
    spans = Spans.of(read_rows(folder))
    columns = ("env_id", "env_options", "seed", "episode", "end_reason", "success", "turn", "action", "error")
    tasks: dict[TaskKey, list[EvaluationRow]] = defaultdict(list)
    values = zip(*map(spans.column, columns), spans.rewards.tolist(), strict=True)
    for env_id, options, seed, sample, end, success, turn, action, error, reward in values:
        answer = vote(action, majority)
        row = EvaluationRow(sample, EndReason(end), reward, success, turn + 1, 0, -1, error, answer)
        tasks[env_id, options, seed].append(row)
    return tasks


def stored_evaluation(folder: Path, majority: Majority = "none") -> Evaluation:
    """The result of a stored evaluation, from its rows. TooManyFailures if every episode failed."""
    tasks = list(stored_tasks(folder, majority).values())
    return Evaluation.of_tasks(tasks, samples=max(map(len, tasks)), voted=majority != "none")


@dataclass(frozen=True, slots=True)
class Difference:
    """The mean of a quantity in two evaluations, and of its difference over the tasks."""

    first: float
    second: float
    difference: float  # first - second
    interval: tuple[float, float]  # 95%, paired bootstrap over tasks

    @classmethod
    def of(cls, pairs: Sequence[tuple[float, float]]) -> Self:
        """From the means of each task in both. The pairing removes what tasks differ in from the interval.

        B. Efron, R. J. Tibshirani, "An Introduction to the Bootstrap" (1993), chapter 8; E. Miller, "Adding Error Bars
        to Evals", arXiv:2411.00640 (2024), section 4.2, on paired differences of models.
        """
        differences = [first - second for first, second in pairs]
        first, second = (sum(each) / len(pairs) for each in zip(*pairs, strict=True))
        interval = clustered_interval([[each] for each in differences])
        return cls(first, second, sum(differences) / len(pairs), interval)

    def said(self, name: str) -> str:
        low, high = self.interval
        return (
            f"{name} {self.first:.3f} against {self.second:.3f}: difference {self.difference:+.3f} "
            f"(95% interval {low:+.3f} to {high:+.3f}, paired by task)"
        )


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two evaluations of the same tasks, compared task by task."""

    tasks: int  # that both have played
    unpaired: int  # tasks that one has played alone
    reward: Difference
    success: Difference | None  # None without verdicts
    won: (
        int | None
    )  # tasks that only the first has solved; None with several samples a task, or without verdicts
    lost: int | None  # that only the second has solved
    p_value: float | None  # McNemar's exact test of the two

    @classmethod
    def of(cls, first: Tasks, second: Tasks) -> Self:
        """Compare sound episodes. ConfigError if the two have no task in common."""
        mine, theirs = _sound(first), _sound(second)
        keys = [key for key in mine if key in theirs]
        if not keys:
            raise ConfigError(
                "the two evaluations have no task in common: environment, options and seeds must be equal"
            )
        pairs = [(mine[key], theirs[key]) for key in keys]
        judged = all(
            any(row.success is not None for rows in each for row in rows) for each in zip(*pairs, strict=True)
        )
        success = won = lost = p_value = None
        if judged:
            success = Difference.of([(_success(a), _success(b)) for a, b in pairs])
            if all(len(a) == len(b) == 1 for a, b in pairs):
                won = sum(_success(a) > _success(b) for a, b in pairs)
                lost = sum(_success(a) < _success(b) for a, b in pairs)
                p_value = mcnemar(lost, won)
        reward = Difference.of([(_reward(a), _reward(b)) for a, b in pairs])
        return cls(len(keys), len(mine) + len(theirs) - 2 * len(keys), reward, success, won, lost, p_value)

    def __str__(self) -> str:
        lines = [] if self.success is None else [self.success.said("success")]
        lines.append(self.reward.said("reward"))
        told = f"{self.tasks} tasks"
        if self.p_value is not None:
            told += f", {self.won} won and {self.lost} lost; McNemar's exact test: p = {self.p_value:.3g}"
        if self.unpaired:
            told += f"; {self.unpaired} tasks that only one has played are left out"
        return "\n".join([*lines, told])

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")


def _sound(tasks: Tasks) -> Tasks:
    """The tasks with their sound episodes, those without any left out."""
    sound = {key: [row for row in rows if row.sound] for key, rows in tasks.items()}
    return {key: rows for key, rows in sound.items() if rows}


def _success(rows: Sequence[EvaluationRow]) -> float:
    return sum(bool(row.success) for row in rows) / len(rows)


def _reward(rows: Sequence[EvaluationRow]) -> float:
    return sum(row.reward for row in rows) / len(rows)
