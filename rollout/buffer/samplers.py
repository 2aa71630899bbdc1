"""Samplers of reused groups: `buffer.reuse.sampler`, chosen by its `kind`.

A sampler orders the candidates, and a step takes the first of them, so that no group comes twice. It is a pure
function: its randomness is one uniform number per candidate, drawn by the caller.
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

SMALLEST = 1e-6  # added to all priorities, so that none is zero


@dataclass(frozen=True, slots=True)
class Candidate:
    """A group that may be reused."""

    group_id: int
    taken_version: int  # of the step that had it fresh
    rewards: tuple[float, ...]  # of its trainable episodes


class _Sampler(BaseModel, extra="forbid", frozen=True):
    pass


class Fifo(_Sampler):
    """Groups that were trained longest ago first."""

    kind: Literal["fifo"] = "fifo"

    def __call__(self, candidates: Sequence[Candidate], uniform_C: Floats) -> list[Candidate]:
        return sorted(candidates, key=lambda candidate: (candidate.taken_version, candidate.group_id))


class Uniform(_Sampler):
    """Uniform random order."""

    kind: Literal["uniform"] = "uniform"

    def __call__(self, candidates: Sequence[Candidate], uniform_C: Floats) -> list[Candidate]:
        return [candidates[index] for index in np.argsort(uniform_C, kind="stable")]


class Prioritized(_Sampler):
    """Proportional prioritization: P(i) = p_i^exponent / sum_k p_k^exponent. Schaul et al. 2016 (1511.05952), eq. 1.

    Their p is the magnitude of the last error; here it is a group's mean absolute advantage, `spread`. They draw with
    replacement; here each draw is from the groups that are left, since a step trains no group twice.
    """

    kind: Literal["prioritized"] = "prioritized"
    exponent: float = Field(
        0.6,
        ge=0,
        description="exponent of the priority, the mean absolute deviation of a group's rewards; 0 is uniform "
        "sampling, larger values prefer groups with unequal rewards",
    )

    def __call__(self, candidates: Sequence[Candidate], uniform_C: Floats) -> list[Candidate]:
        priority_C = np.array([spread(candidate.rewards) + SMALLEST for candidate in candidates])
        # Sorting independent exponential times with these rates gives the order of such draws: Efraimidis and Spirakis
        # 2006, algorithm A.
        times_C = -np.log1p(-uniform_C) / priority_C**self.exponent
        return [candidates[index] for index in np.argsort(times_C, kind="stable")]


def spread(rewards: Sequence[float]) -> float:
    """Mean |R - mean of the siblings' R|; 0 if all are equal."""
    return 0.0 if all_equal(rewards) else float(np.abs(np.asarray(rewards) - np.mean(rewards)).mean())


class OwnSampler(OwnPart):
    """A user's own sampler: (candidates, uniform numbers [C]) -> candidates in the order of reuse.

    It must be a pure function: a repeated step must choose the same groups.
    """

    CALLED_WITH: ClassVar[tuple[str, ...]] = ("candidates", "uniform_C")

    def __call__(self, candidates: Sequence[Candidate], uniform_C: Floats) -> list[Candidate]:
        ordered = list(self.call(candidates, uniform_C))
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
