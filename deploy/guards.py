"""Guard rails: metrics that must stay within bounds, each with a warning or an end of the run.

    guards = [{ metric = "entropy", below = 0.05, action = "stop", steps = 20 }]

A guard speaks when its metric was out of bounds for so many steps in a row; a step without the metric says nothing.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, Self

from pydantic import BaseModel, Field, model_validator

METRICS = (
    "behavior_gap",
    "clip_fraction",
    "effective_samples",
    "entropy",
    "grad_norm",
    "kl",
    "lag_max",
    "loss",
    "masked_fraction",
    "nonfinite_batches",
    "reference_kl",
    "repetition",
    "reward",
    "sampled_per_episode",
    "success",
    "turns",
    "untrainable_episodes",
    "value_error",
    "zero_advantage_fraction",
)


class GuardTripped(RuntimeError):
    """A guard ended the run; the message says which, and what it saw."""


class Guard(BaseModel, extra="forbid", frozen=True):
    """Bounds of one metric."""

    metric: str = Field(description="a metric of the learner's steps")
    below: float | None = Field(default=None, description="out of bounds when smaller")
    above: float | None = Field(default=None, description="out of bounds when larger")
    action: Literal["warn", "stop"] = Field(default="warn", description="say so, or end the run")
    steps: int = Field(default=1, ge=1, description="steps in a row that it takes")

    @model_validator(mode="after")
    def _means_something(self) -> Self:
        if self.metric not in METRICS:
            close = difflib.get_close_matches(self.metric, METRICS, n=1, cutoff=0.3) or METRICS
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
    Guard(metric="effective_samples", below=0.3, steps=5),
    Guard(metric="clip_fraction", above=0.5, steps=5),
    Guard(metric="kl", above=0.5, steps=5),
    Guard(metric="repetition", above=0.5, steps=5),
    Guard(metric="zero_advantage_fraction", above=0.99, steps=10),
)


class Watch:
    """Looks at every step. Speaks once when a guard trips, and again only after its metric was within bounds."""

    def __init__(self, guards: Sequence[Guard], say: Callable[[str], None]) -> None:
        self._guards = guards
        self._say = say
        self._broken = dict.fromkeys(range(len(guards)), 0)

    def look(self, step: int, row: Mapping[str, float]) -> None:
        """Take in one step's metrics. Raises GuardTripped."""
        for place, guard in enumerate(self._guards):
            if guard.metric not in row:
                continue
            value = row[guard.metric]
            self._broken[place] = self._broken[place] + 1 if guard.broken_by(value) else 0
            if self._broken[place] == guard.steps:
                said = f"step {step}: {guard.metric} is {value:.4g} ({guard} for {guard.steps} steps)"
                if guard.action == "stop":
                    raise GuardTripped(f"stopped by a guard: {said}; checkpoints and rows are as they were")
                self._say(f"ALARM: {said}")
