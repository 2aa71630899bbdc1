"""Kahneman-Tversky optimization (Ethayarajh et al. 2024): answers that were found good or bad, one by one.

    episodes -> log-probabilities of each, and of an answer that belongs to another prompt
             -> the batch's reference point: mean log-ratio of the latter, which estimates the policy's divergence
             -> loss of each episode -> one optimizer step

The other answer is fixed when the stage begins, so that its reference log-probability is computed once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from learner.algorithm.preferences import kto
from learner.data.prepare import Example
from learner.stages.epochs import Epochs
from learner.stages.settings import KtoSettings
from learner.stages.stage import StageLearner
from learner.stages.whole_episodes import total_logprobs, weigh, weighed_logprobs
from rollout.wire.metrics import Row
from rollout.wire.trajectory import Group, Trajectory


class Kto:
    """The stage of kind "kto". Every trainable episode is one example, good if its reward reaches `desirable_from`."""

    def __init__(self, settings: KtoSettings) -> None:
        self._settings = settings

    def begin(self, learner: StageLearner, groups: Sequence[Group]) -> int:
        """Pair prompts with foreign answers, compute the reference's log-probabilities; returns the optimizer steps."""
        settings = self._settings
        self._learner = learner
        episodes = [episode for group in groups for episode in group.trainable]
        count = len(episodes)
        steps = settings.steps(count)
        self._desirable_E = torch.tensor([each.reward >= settings.desirable_from for each in episodes])
        self._optimizer = learner.optimizer(settings.optim, steps)
        order = learner.rng.permutation(count).tolist()
        others = {place: order[at - 1] for at, place in enumerate(order)}
        foreign = [
            _answered_by(episodes[place], episodes[others[place]], learner.policy.context)
            for place in range(count)
        ]
        self._examples = [
            (Example.of(own), Example.of(other)) for own, other in zip(episodes, foreign, strict=True)
        ]
        self._reference_E2 = learner.kept("reference", lambda: self._totals(range(count)))
        self._epochs = Epochs(count, settings.epochs, settings.episodes_per_step, learner.rng)
        return steps

    def advance(self, step: int) -> Row:
        """One optimizer step on the next `episodes_per_step` episodes of the epoch; its last step may have fewer."""
        settings = self._settings
        chosen = self._epochs.chosen(step, range(len(self._examples)))
        logprobs_E, foreign_E = self._totals(chosen).unbind(1)
        reference_E, foreign_reference_E = self._reference_E2[chosen].unbind(1)
        point = (foreign_E - foreign_reference_E).mean().clamp(min=0.0)
        logprobs_E.requires_grad_()
        loss_E = kto(
            logprobs_E,
            reference_E,
            self._desirable_E[chosen],
            point,
            settings.beta,
            settings.desirable_weight,
            settings.undesirable_weight,
        )
        examples = [self._examples[place][0] for place in chosen]
        weigh(examples, logprobs_E, loss_E.mean())
        row = self._optimizer.step(examples, partial(weighed_logprobs, self._learner.policy))
        rewards_E = settings.beta * (logprobs_E.detach() - reference_E)
        return {
            **row,
            **_by_label(rewards_E, self._desirable_E[chosen]),
            "reference_point": float(point),
            "loss": float(loss_E.detach().mean()),
            "epoch": float(self._epochs.epoch(step)),
        }

    def _totals(self, places: Sequence[int]) -> Tensor:
        """The policy's log-probabilities of these episodes and of their foreign answers: float64 [E, 2]."""
        examples = [example for place in places for example in self._examples[place]]
        return total_logprobs(self._learner, examples).reshape(-1, 2)


def _answered_by(episode: Trajectory, other: Trajectory, context: int) -> Trajectory:
    """The episode's first prompt with the first answer of another, cut to the context."""
    turn, said = episode.turns[0], other.turns[0]
    room = max(context - len(turn.prompt_ids), 0)
    foreign = replace(
        turn,
        action=said.action,
        action_ids=said.action_ids[:room],
        behavior_logprobs=said.behavior_logprobs[:room],
        versions=said.versions[:room],
    )
    return replace(episode, turns=(foreign,))


def _by_label(rewards_E: Tensor, desirable_E: Tensor) -> Mapping[str, float]:
    """Mean implicit rewards of good and of bad answers, and their difference, where the batch has both."""
    named = {"chosen_reward": rewards_E[desirable_E], "rejected_reward": rewards_E[~desirable_E]}
    means = {name: float(values.mean()) for name, values in named.items() if len(values)}
    if len(means) == len(named):
        means["reward_margin"] = means["chosen_reward"] - means["rejected_reward"]
    return means
