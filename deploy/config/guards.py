"""Guard rails: metrics that must stay within bounds, each with a warning or an end of the run.

    guards = [{ metric = "entropy", below = 0.05, action = "stop", steps = 20 }]

A guard speaks when its metric was out of bounds for so many steps in a row; a step without the metric says neither
that it was within them nor that it was not. Where a metric stays away, that is said too.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, Self

from pydantic import BaseModel, Field, model_validator

from deploy.config.declared_metrics import METRICS, is_declared

MISSING_STEPS = 10  # without a metric, until that is said


class GuardTripped(RuntimeError):
    """A guard ended the run; the message says which, and what it saw."""


class Guard(BaseModel, extra="forbid", frozen=True):
    """Bounds of one metric."""

    metric: str = Field(description="name of a metric")
    below: float | None = Field(
        default=None, description="lower bound; the metric is out of bounds when it is smaller"
    )
    above: float | None = Field(
        default=None, description="upper bound; the metric is out of bounds when it is larger"
    )
    action: Literal["warn", "stop"] = Field(
        default="warn",
        description="what the guard does. warn: print an alarm. stop: end the run, with exit status 1",
    )
    steps: int = Field(
        default=1, ge=1, description="consecutive learner steps out of bounds before the guard acts"
    )

    @model_validator(mode="after")
    def _means_something(self) -> Self:
        if not is_declared(self.metric):
            names = [metric.name for metric in METRICS if not metric.is_open]
            close = difflib.get_close_matches(self.metric, names, n=1, cutoff=0.3) or names
            raise ValueError(f"guards: no metric {self.metric!r}; did you mean {close[0]!r}?")
        if self.below is None and self.above is None:
            raise ValueError(f"guards: {self.metric} has no bound; give below, above or both")
        return self

    def broken_by(self, value: float) -> bool:
        """Whether this is out of bounds; what is not a number always is."""
        low = self.below is not None and not value >= self.below
        return low or (self.above is not None and not value <= self.above)

    def __str__(self) -> str:
        bounds = [f"below {self.below:g}"] if self.below is not None else []
        bounds += [f"above {self.above:g}"] if self.above is not None else []
        return f"{self.metric} {' or '.join(bounds)}"


DEFAULTS = (
    Guard(metric="nonfinite_batches", above=0),
    Guard(metric="skipped_step", above=0),
    Guard(metric="value_skipped_step", above=0),
    Guard(metric="entropy", below=0.01, steps=10),
    Guard(metric="effective_samples", below=0.3, steps=5),
    Guard(metric="masked_fraction", above=0.5, steps=5),
    Guard(metric="clip_fraction", above=0.5, steps=5),
    Guard(metric="kl", above=0.5, steps=5),
    Guard(metric="repetition", above=0.5, steps=5),
    Guard(metric="zero_advantage_fraction", above=0.99, steps=10),
)


def with_defaults(guards: Sequence[Guard]) -> tuple[Guard, ...]:
    """These, and the defaults of metrics that none of them bounds."""
    bounded = {guard.metric for guard in guards}
    return (*guards, *(guard for guard in DEFAULTS if guard.metric not in bounded))


class Watch:
    """Looks at every step. Speaks once when a guard trips, and again only after its metric was within bounds.

    Speaks too, once, when a metric stays away for MISSING_STEPS steps, if it was there before or it was asked to be
    bounded: a default guard of what an algorithm never says is no news.
    """

    def __init__(self, guards: Sequence[Guard], say: Callable[[str], None]) -> None:
        self._guards = guards
        self._say = say
        self._broken = dict.fromkeys(range(len(guards)), 0)
        self._missing = dict.fromkeys(range(len(guards)), 0)  # steps in a row
        self._expected = [guard not in DEFAULTS for guard in guards]

    def look(self, step: int, row: Mapping[str, float]) -> None:
        """Take in one step's metrics. Raises GuardTripped."""
        for place, guard in enumerate(self._guards):
            if guard.metric not in row:
                self._missing[place] += 1
                if self._missing[place] == MISSING_STEPS and self._expected[place]:
                    self._say(
                        f"ALARM: step {step}: {guard.metric} was not said for {MISSING_STEPS} steps: nothing guards it"
                    )
                continue
            self._missing[place], self._expected[place] = 0, True
            value = row[guard.metric]
            self._broken[place] = self._broken[place] + 1 if guard.broken_by(value) else 0
            if self._broken[place] == guard.steps:
                said = f"step {step}: {guard.metric} is {value:.4g} ({guard} for {guard.steps} steps)"
                if guard.action == "stop":
                    raise GuardTripped(f"stopped by a guard: {said}; checkpoints and rows are as they were")
                self._say(f"ALARM: {said}")
