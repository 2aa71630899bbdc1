"""Supervised fine-tuning: minimize the negative log-likelihood of recorded actions, in a new order each epoch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from learner.algorithm.losses import cross_entropy
from learner.data.batch import MicroBatch
from learner.data.prepare import Example
from learner.stages.epochs import Epochs
from learner.stages.settings import SftSettings
from learner.stages.stage import StageLearner
from rollout.wire.metrics import Row
from rollout.wire.trajectory import Group


class Sft:
    """The stage of kind "sft". Every trainable episode is one example."""

    def __init__(self, settings: SftSettings) -> None:
        self._settings = settings

    def begin(self, learner: StageLearner, groups: Sequence[Group]) -> int:
        """Draw the order of every epoch; returns the optimizer steps of all epochs."""
        settings = self._settings
        self._policy = learner.policy
        self._examples = [Example.of(episode) for group in groups for episode in group.trainable]
        count = len(self._examples)
        steps = settings.steps(count)
        self._optimizer = learner.optimizer(settings.optim, steps)
        self._epochs = Epochs(count, settings.epochs, settings.episodes_per_step, learner.rng)
        return steps

    def advance(self, step: int) -> Row:
        """One optimizer step on the next `episodes_per_step` episodes of the epoch; its last step may have fewer."""
        row = self._optimizer.step(self._epochs.chosen(step, self._examples), self._loss)
        return {**row, "epoch": float(self._epochs.epoch(step))}

    def _loss(self, micro: MicroBatch) -> tuple[Tensor, Mapping[str, Tensor]]:
        logprobs_N, entropy_N = self._policy.score(micro, 1.0)
        return cross_entropy(logprobs_N), {"entropy": entropy_N.detach()}
