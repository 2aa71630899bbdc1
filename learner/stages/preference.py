"""Preference optimization: raise the better episode of a group against the worse, by DPO and its kin.

    groups -> pairs (best, worst by reward) -> log-probabilities of both -> loss of the pairs -> weight of each episode
           -> one optimizer step whose gradient is the pairs' own

Both episodes of a pair are dealt and packed like any other (`learner.stages.whole_episodes`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from learner.algorithm.preferences import Pairs
from learner.data.prepare import Example
from learner.stages.epochs import Epochs
from learner.stages.settings import PreferenceSettings
from learner.stages.stage import StageLearner
from learner.stages.whole_episodes import total_logprobs, weigh, weighed_logprobs
from rollout.wire.metrics import Row
from rollout.wire.trajectory import Group, Trajectory


def best_and_worst(groups: Sequence[Group]) -> list[tuple[Trajectory, Trajectory]]:
    """The episodes of the most and of the least reward of each group in which they differ."""
    ranked = [sorted(group.trainable, key=lambda episode: episode.reward) for group in groups]
    return [(each[-1], each[0]) for each in ranked if each and each[0].reward < each[-1].reward]


class Preference:
    """The stage of kind "preference". A group's pair is its episode of the most reward and that of the least."""

    def __init__(self, settings: PreferenceSettings) -> None:
        self._settings = settings

    def begin(self, learner: StageLearner, groups: Sequence[Group]) -> int:
        """Make the pairs and the reference's log-probabilities; returns the optimizer steps of all epochs."""
        settings = self._settings
        self._learner = learner
        self._pairs = [(Example.of(better), Example.of(worse)) for better, worse in best_and_worst(groups)]
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
        examples = [example for place in chosen for example in self._pairs[place]]
        weigh(examples, totals_P2, loss_P.mean())
        row = self._optimizer.step(examples, partial(weighed_logprobs, self._learner.policy))
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
        return total_logprobs(self._learner, examples).reshape(-1, 2)

    def _of(self, places: Sequence[int], totals_P2: Tensor) -> Pairs:
        pairs = [self._pairs[place] for place in places]
        tokens_P2 = torch.tensor([[each.trajectory.num_sampled for each in pair] for pair in pairs])
        reference_P2 = self._reference_P2[list(places)]
        columns = (each for found_P2 in (totals_P2, reference_P2, tokens_P2) for each in found_P2.unbind(1))
        return Pairs(*columns)
