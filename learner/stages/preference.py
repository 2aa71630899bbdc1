"""Preference optimization: raise the better episode of a group against the worse, by DPO and its kin.

    groups -> pairs (best, worst by reward) -> log-probabilities of both -> loss of the pairs -> weight of each episode
           -> one optimizer step whose gradient is the pairs' own

A loss of pairs is a function of log-probabilities s of episodes. Its gradient is the sum of (dL/ds) times the gradient
of s, so each episode is weighed by dL/ds and dealt and packed like any other: a pair need not lie in one micro-batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from learner.algorithm.preferences import Pairs
from learner.data.batch import MicroBatch
from learner.data.prepare import Example
from learner.stages.epochs import Epochs
from learner.stages.settings import PreferenceSettings
from learner.stages.stage import StageLearner
from rollout.wire.metrics import Row
from rollout.wire.trajectory import Group


class Preference:
    """The stage of kind "preference". A group's pair is its episode of the most reward and that of the least."""

    def __init__(self, settings: PreferenceSettings) -> None:
        self._settings = settings

    def begin(self, learner: StageLearner, groups: Sequence[Group]) -> int:
        """Make the pairs and the reference's log-probabilities; returns the optimizer steps of all epochs."""
        settings = self._settings
        self._learner = learner
        ranked = [sorted(group.trainable, key=lambda episode: episode.reward) for group in groups]
        unequal = [each for each in ranked if each and each[0].reward < each[-1].reward]
        self._pairs = [(Example.of(each[-1]), Example.of(each[0])) for each in unequal]
        steps = settings.steps(len(self._pairs))
        self._optimizer = learner.optimizer(settings.optim, steps)
        self._reference_P2 = (
            learner.kept("reference", lambda: self._totals(range(len(self._pairs))))
            if settings.loss.has_reference
            else torch.zeros(len(self._pairs), 2, dtype=torch.float64)
        )
        self._epochs = Epochs(len(self._pairs), settings.epochs, settings.pairs_per_step, learner.rng)
        return steps

    def advance(self, step: int) -> Row:
        """One optimizer step on the next `pairs_per_step` pairs of the epoch; its last step may have fewer."""
        chosen = self._epochs.chosen(step, range(len(self._pairs)))
        totals_P2 = self._totals(chosen).requires_grad_()
        loss_P, statistics = self._settings.loss(self._of(chosen, totals_P2))
        (pull_P2,) = torch.autograd.grad(loss_P.mean(), totals_P2)
        examples = [example for place in chosen for example in self._pairs[place]]
        # An optimizer's step averages over tokens: that is undone, so that the pairs weigh alike.
        tokens = sum(example.trajectory.num_sampled for example in examples)
        for example, pull in zip(examples, pull_P2.flatten().tolist(), strict=True):
            example.advantages_N[:] = -pull * tokens
        row = self._optimizer.step(examples, self._weighed)
        means = {name: float(values_P.mean()) for name, values_P in statistics.items()}
        return {
            **row,
            **means,
            "loss": float(loss_P.detach().mean()),
            "epoch": float(self._epochs.epoch(step)),
        }

    def _totals(self, places: Sequence[int]) -> Tensor:
        """The policy's log-probability of both episodes of these pairs: float64 [P, 2]."""
        examples = [example for place in places for example in self._pairs[place]]
        found = [float(logprobs_N.sum(dtype=np.float64)) for logprobs_N in self._learner.logprobs(examples)]
        return torch.tensor(found, dtype=torch.float64).reshape(-1, 2)

    def _of(self, places: Sequence[int], totals_P2: Tensor) -> Pairs:
        pairs = [self._pairs[place] for place in places]
        tokens_P2 = torch.tensor([[each.trajectory.num_sampled for each in pair] for pair in pairs])
        reference_P2 = self._reference_P2[list(places)]
        columns = (each for found_P2 in (totals_P2, reference_P2, tokens_P2) for each in found_P2.unbind(1))
        return Pairs(*columns)

    def _weighed(self, micro: MicroBatch) -> tuple[Tensor, Mapping[str, Tensor]]:
        logprobs_N, entropy_N = self._learner.policy.score(micro, 1.0)
        return -micro.advantages_N * logprobs_N, {"entropy": entropy_N.detach()}
