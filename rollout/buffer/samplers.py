"""Which of the groups that may be reused a step reuses: `buffer.reuse.sampler`, its `kind` says how.

A sampler orders the candidates and a step takes the first of them, so no group twice. Chance comes in as one uniform
number a candidate, drawn by whoever asks: a sampler is a pure function.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field

from rollout.wire.equality import all_equal
from rollout.wire.own_part import BUILT_IN, BY_KIND, OWN, OwnPart, OwnPartRefused

Floats = NDArray[np.float64]

SMALLEST = 1e-6  # added to a priority, so that a group without any is still found at times


@dataclass(frozen=True, slots=True)
class Candidate:
    """A group that may be reused."""

    group_id: int
    taken_version: int  # of the step that had it fresh
    rewards: tuple[float, ...]  # of its trainable episodes


class _Sampler(BaseModel, extra="forbid", frozen=True):
    pass


class Fifo(_Sampler):
    """Those trained longest ago first."""

    kind: Literal["fifo"] = "fifo"

    def __call__(self, candidates: Sequence[Candidate], uniform_C: Floats) -> list[Candidate]:
        return sorted(candidates, key=lambda candidate: (candidate.taken_version, candidate.group_id))


class Uniform(_Sampler):
    """Every order is as likely."""

    kind: Literal["uniform"] = "uniform"

    def __call__(self, candidates: Sequence[Candidate], uniform_C: Floats) -> list[Candidate]:
        return [candidates[place] for place in np.argsort(uniform_C, kind="stable")]


class Prioritized(_Sampler):
    """Proportional prioritization: P(i) = p_i^exponent / sum_k p_k^exponent. Schaul et al. 2016 (1511.05952), eq. 1.

    Their p is the size of the last error; a group's is its mean absolute advantage, `spread`. They draw with
    replacement. A step trains no group twice, so the next is drawn from those that are left.
    """

    kind: Literal["prioritized"] = "prioritized"
    exponent: float = Field(0.6, ge=0, description="how much the spread of rewards matters; 0: uniform")

    def __call__(self, candidates: Sequence[Candidate], uniform_C: Floats) -> list[Candidate]:
        priority_C = np.array([spread(candidate.rewards) + SMALLEST for candidate in candidates])
        # The order of independent exponential times with these rates is that of such draws: Efraimidis and Spirakis
        # 2006, algorithm A.
        times_C = -np.log1p(-uniform_C) / priority_C**self.exponent
        return [candidates[place] for place in np.argsort(times_C, kind="stable")]


def spread(rewards: Sequence[float]) -> float:
    """Mean |R - mean of the siblings' R|: 0 where all earned the same."""
    return 0.0 if all_equal(rewards) else float(np.abs(np.asarray(rewards) - np.mean(rewards)).mean())


class OwnSampler(OwnPart):
    """A user's own: (candidates, uniform numbers [C]) -> candidates in the order in which they are to be reused.

    A pure function: a step that is done again must choose the same again.
    """

    CALLED_WITH: ClassVar[tuple[str, ...]] = ("candidates", "uniform_C")

    def __call__(self, candidates: Sequence[Candidate], uniform_C: Floats) -> list[Candidate]:
        ordered = list(self.run(candidates, uniform_C))
        if len(set(ordered)) != len(ordered) or not set(ordered) <= set(candidates):
            raise OwnPartRefused(f"{self.kind} must return candidates that it was given, each at most once")
        return ordered

    def try_out(self, critic: bool) -> None:
        self([Candidate(3, 1, (1.0, 0.0)), Candidate(5, 2, (0.5, 0.5))], np.array([0.2, 0.7]))
        self([], np.zeros(0))


AnySampler = Annotated[
    Annotated[Fifo | Uniform | Prioritized, Field(discriminator="kind"), BUILT_IN]
    | Annotated[OwnSampler, OWN],
    BY_KIND,
]
