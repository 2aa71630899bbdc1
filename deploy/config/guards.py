"""Guards: bounds of metrics, each with a warning or the end of the run.

    guards = [{ metric = "entropy", below = 0.05, action = "stop", steps = 20 }]

A guard acts when its metric was out of bounds for `steps` steps in a row. A step without the metric counts neither as
within bounds nor as outside. A metric that is missing for many steps is reported.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, Self

from pydantic import BaseModel, Field, model_validator

from deploy.config.declared_metrics import METRICS, is_declared

MISSING_STEPS = 10  # steps without a metric before that is reported


class GuardTripped(RuntimeError):
    """A guard ended the run; the message names its metric, value and bound."""


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
            raise ValueError(f"guards: unknown metric {self.metric!r}; did you mean {close[0]!r}?")
        if self.below is None and self.above is None:
            raise ValueError(f"guards: {self.metric} has no bound; set below, above or both")
        return self

    def broken_by(self, value: float) -> bool:
        """Whether a value is out of bounds; NaN always is."""
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
    """These guards, and the default guards of metrics that they do not bound."""
    bounded = {guard.metric for guard in guards}
    return (*guards, *(guard for guard in DEFAULTS if guard.metric not in bounded))


class GuardMonitor:
    """Checks every step. A guard is reported once when it trips, and again only after its metric was within bounds.

    A metric that is missing for MISSING_STEPS steps is reported once, if it was there before or a guard of the recipe
    bounds it; a default guard may bound a metric that the algorithm never reports.
    """

    def __init__(self, guards: Sequence[Guard], say: Callable[[str], None]) -> None:
        self._guards = guards
        self._say = say
        self._broken = dict.fromkeys(range(len(guards)), 0)
        self._missing = dict.fromkeys(range(len(guards)), 0)  # steps in a row
        self._expected = [guard not in DEFAULTS for guard in guards]

    def observe(self, step: int, row: Mapping[str, float]) -> None:
        """Check one step's metrics. Raises GuardTripped."""
        for place, guard in enumerate(self._guards):
            if guard.metric not in row:
                self._missing[place] += 1
                if self._missing[place] == MISSING_STEPS and self._expected[place]:
                    self._say(
                        f"ALARM: step {step}: {guard.metric} was missing for {MISSING_STEPS} steps; its guard cannot "
                        "act"
                    )
                continue
            self._missing[place], self._expected[place] = 0, True
            value = row[guard.metric]
            self._broken[place] = self._broken[place] + 1 if guard.broken_by(value) else 0
            if self._broken[place] == guard.steps:
                said = f"step {step}: {guard.metric} is {value:.4g} ({guard} for {guard.steps} steps)"
                if guard.action == "stop":
                    raise GuardTripped(f"stopped by a guard: {said}; checkpoints and rows are unchanged")
                self._say(f"ALARM: {said}")
