"""What a stage is, and what a learner gives it.

A stage learns from a fixed set of episodes in a known number of steps:

    begin(learner, groups) -> steps     make ready: keep the data, ask for optimizers, say how many steps there are
    advance(step) -> metrics            make step number `step`, counted from 0

Everything that a step changes belongs to the learner: the policy, the modules and optimizers that `begin` asked for,
and the random generator. A stage itself keeps only what follows from its settings and data; a tensor that follows from
the policy as the stage found it is `kept`. A stopped run can therefore begin the stage again and go on at the step of
its checkpoint.
All ranks are given all groups, and call the same things in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Protocol, Self

import numpy as np
from torch import Tensor, nn

from learner.algorithm.estimators import Values
from learner.algorithm.schedule import OptimSettings
from learner.data.batch import MicroBatch
from learner.data.prepare import Example
from learner.model.policy import Policy
from learner.parallel.auxiliary import AuxiliaryModule
from learner.parallel.ranks import Ranks
from rollout.wire.metrics import Row
from rollout.wire.trajectory import Float32Array, Group

# (micro-batch on the policy's device) -> (loss of each scored token [N], statistics [N] without gradient)
StageLoss = Callable[[MicroBatch], tuple[Tensor, Mapping[str, Tensor]]]
# hidden states of the policy [N, D] -> a value of each [N]
StateValue = Callable[[Tensor], Tensor]


class StageOptimizer(Protocol):
    """An optimizer over parameters of the policy or of modules; checkpoints hold its moments."""

    def step(
        self,
        examples: Sequence[Example],
        loss: StageLoss,
        beside: Mapping[str, Self] = MappingProxyType({}),
    ) -> Row:
        """One optimizer step on these episodes, which are dealt to the ranks.

        loss: reads the policy (`policy.score` or `policy.read`); every sampled token weighs the same. beside:
        optimizers of other parameters that take the gradient of the same loss in a step of their own. Returns the loss,
        the statistics' means, "grad_norm", "learning_rate", "skipped_step", "idle_step", counts of tokens, and the norm
        "NAME_grad_norm" of each NAME in `beside`. If one of the steps is not finite none is made: "skipped_step".
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

    def optimizer(
        self, settings: OptimSettings, steps: int, of: Sequence[AuxiliaryModule] = ()
    ) -> StageOptimizer:
        """A new optimizer. To be asked for in `begin`; steps: where a falling learning rate ends.

        of: the modules whose parameters it moves; none: the policy's.
        """

    def module(self, name: str, module: nn.Module) -> AuxiliaryModule:
        """A module of the stage's own, such as a value head, to be asked for in `begin`; checkpoints hold its state.

        All ranks must make it with the same values. ValueError for a name that is taken.
        """

    def kept(self, name: str, compute: Callable[[], Tensor]) -> Tensor:
        """A tensor that is computed once, when the stage first begins; checkpoints hold it. Ask for it in `begin`."""

    def share(self, examples: Sequence[Example]) -> list[Example]:
        """Those of the episodes that a step on all of them deals to this rank."""

    def values(self, examples: Sequence[Example], value: StateValue) -> list[Values]:
        """Values of the states before every sampled token, and of the state behind the last one; no gradient.

        Ranks compute together, each its own examples.
        """

    def logprobs(self, examples: Sequence[Example]) -> list[Float32Array]:
        """The policy's log-probability of every sampled token: natural, float32 [N] for each episode, no gradient."""


class Stage(Protocol):
    """One stage of a run."""

    def begin(self, learner: StageLearner, groups: Sequence[Group]) -> int:
        """Make ready to learn from these groups; returns how many steps there are."""

    def advance(self, step: int) -> Row:
        """Make step number `step` and return its metrics. Asked in order, each step once."""
