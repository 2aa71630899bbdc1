"""The result of an evaluation: success (if the environment gives verdicts) and reward, each with an interval.

RUN/evaluation_before.json and evaluation_after.json store one each.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from deploy.config.config_errors import ConfigError
from deploy.report.statistics import bootstrap_interval, wilson_interval
from rollout.buffer.failures import TooManyFailures, cause_of
from rollout.buffer.replay_store import EpisodeRow

WHEN = ("before", "after")  # of training


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The result of one episode a task. Episodes that failed by infrastructure are left out."""

    successes: int | None  # None: no episode has a verdict
    episodes: int
    mean_reward: float
    failed: int
    reward_interval: tuple[float, float] | None = None  # 95%, bootstrap
    held_out: bool = False  # the tasks are of a split that training cannot draw from
    environments: dict[str, Evaluation] = field(default_factory=dict)  # by name, of a run with several

    @classmethod
    def of(cls, rows: Sequence[EpisodeRow], held_out: bool = False) -> Self:
        """The result of stored episodes. TooManyFailures, with the last error, if every episode failed."""
        sound = [row for row in rows if row.sound]
        if not sound:
            error = rows[-1].error or ""
            raise TooManyFailures(
                f"all {len(rows)} evaluation episodes failed; the last: {cause_of(error)}", error
            )
        judged = any(row.success is not None for row in sound)
        rewards = [row.reward for row in sound]
        return cls(
            successes=sum(bool(row.success) for row in sound) if judged else None,
            episodes=len(sound),
            mean_reward=sum(rewards) / len(rewards),
            failed=len(rows) - len(sound),
            reward_interval=bootstrap_interval(rewards),
            held_out=held_out,
        )

    @staticmethod
    def of_environments(played: Mapping[str, Sequence[EpisodeRow]], held_out: Collection[str]) -> Evaluation:
        """The result of all episodes of a run, and of each environment's, where there are several.

        held_out: names of the environments whose tasks are. Raises TooManyFailures as `of` does, for each.
        """
        each = {name: Evaluation.of(rows, name in held_out) for name, rows in played.items()}
        if len(each) == 1:
            return next(iter(each.values()))
        total = Evaluation.of([row for rows in played.values() for row in rows], len(held_out) == len(played))
        return replace(total, environments=each)

    @property
    def success(self) -> float | None:
        """Share of the sound episodes with success; None without verdicts."""
        return None if self.successes is None else self.successes / self.episodes

    @property
    def interval(self) -> tuple[float, float] | None:
        """95% Wilson interval of the success; None without verdicts."""
        return None if self.successes is None else wilson_interval(self.successes, self.episodes)

    def __str__(self) -> str:
        lost = f", {self.failed} more failed" if self.failed else ""
        reward = said(
            "reward" if self.successes is None else "mean reward", self.mean_reward, self.reward_interval
        )
        success = "" if self.success is None else said("success", self.success, self.interval) + ", "
        return f"{success}{reward}, {self.episodes} episodes{lost}"

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a stored result. ConfigError for a damaged file."""
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            each = {name: Evaluation(**own) for name, own in stored.pop("environments", {}).items()}
            return cls(**stored, environments=each)
        except (ValueError, TypeError, AttributeError) as error:
            raise ConfigError(f"{path}: broken file ({error}); remove it to continue without it") from error


def said(name: str, value: float, interval: Sequence[float] | None) -> str:
    """A number with its 95% interval, as text."""
    return f"{name} {value:.3f}" + (
        f" (95% interval {interval[0]:.3f} to {interval[1]:.3f})" if interval else ""
    )


def figures(before: Evaluation | None, after: Evaluation | None) -> dict[str, Any]:
    """The evaluations as keys of summary.json: success_WHEN and reward_WHEN, each with its _interval, or None.

    `environments` has the same of each environment by its name, in a run with several.
    If one of them has verdicts, the environment gives them, and the other one without any has a success of 0.
    """
    if any(each.successes is not None for each in (before, after) if each):
        before, after = (each and replace(each, successes=each.successes or 0) for each in (before, after))
    found: dict[str, Any] = {"held_out": any(each.held_out for each in (before, after) if each)}
    for when, each in zip(WHEN, (before, after), strict=True):
        found |= {
            f"success_{when}": each and each.success,
            f"success_{when}_interval": each and each.interval,
            f"reward_{when}": each and each.mean_reward,
            f"reward_{when}_interval": each and each.reward_interval,
        }
    first, last = ({} if each is None else each.environments for each in (before, after))
    if names := dict.fromkeys([*first, *last]):
        found["environments"] = {name: figures(first.get(name), last.get(name)) for name in names}
    return found


def stored_figures(run_folder: Path) -> dict[str, Any]:
    """The results of the evaluations that an unfinished run has made so far."""
    paths = [run_folder / f"evaluation_{when}.json" for when in WHEN]
    before, after = (Evaluation.load(path) if path.is_file() else None for path in paths)
    return figures(before, after)
