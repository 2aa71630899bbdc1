"""What a stage is, and what a learner gives it.

A stage learns from a fixed set of episodes in a known number of steps:

    begin(learner, groups) -> steps     make ready: keep the data, ask for optimizers, say how many steps there are
    advance(step) -> metrics            make step number `step`, counted from 0

Everything that a step changes belongs to the learner: the policy, the optimizers that `begin` asked for, and the random
generator. A stage itself keeps only what follows from its settings and data; a tensor that follows from the policy as
the stage found it is `kept`. A stopped run can therefore begin the stage again and go on at the step of its checkpoint.
All ranks are given all groups, and call the same things in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np
from torch import Tensor

from learner.algorithm.schedule import OptimSettings
from learner.data.batch import MicroBatch
from learner.data.prepare import Example
from learner.model.policy import Policy
from learner.parallel.ranks import Ranks
from rollout.wire.metrics import Row
from rollout.wire.trajectory import Float32Array, Group

# (micro-batch on the policy's device) -> (loss of each scored token [N], statistics [N] without gradient)
StageLoss = Callable[[MicroBatch], tuple[Tensor, Mapping[str, Tensor]]]


class StageOptimizer(Protocol):
    """An optimizer over the policy's parameters; checkpoints hold its moments."""

    def step(self, examples: Sequence[Example], loss: StageLoss) -> Row:
        """One optimizer step on these episodes, which are dealt to the ranks.

        loss: reads the policy (`policy.score` or `policy.read`); every sampled token weighs the same. Returns the loss,
        the statistics' means, "grad_norm", "learning_rate", "skipped_step", "idle_step" and counts of tokens. A step
        that is not finite changes nothing and is "skipped_step".
        """


class StageLearner(Protocol):
    """What a stage is given to learn with."""

    @property
    def policy(self) -> Policy:
        """The model that learns."""

    @property
    def ranks(self) -> Ranks:
        """The processes that learn together."""

    @property
    def rng(self) -> np.random.Generator:
        """The run's random generator, alike on all ranks."""

    def optimizer(self, settings: OptimSettings, steps: int) -> StageOptimizer:
        """A new optimizer. To be asked for in `begin`; steps: where a falling learning rate ends."""

    def kept(self, name: str, compute: Callable[[], Tensor]) -> Tensor:
        """A tensor that is computed once, when the stage first begins; checkpoints hold it. Ask for it in `begin`."""

    def logprobs(self, examples: Sequence[Example]) -> list[Float32Array]:
        """The policy's log-probability of every sampled token: natural, float32 [N] for each episode, no gradient."""


class Stage(Protocol):
    """One stage of a run."""

    def begin(self, learner: StageLearner, groups: Sequence[Group]) -> int:
        """Make ready to learn from these groups; returns how many steps there are."""

    def advance(self, step: int) -> Row:
        """Make step number `step` and return its metrics. Asked in order, each step once."""
