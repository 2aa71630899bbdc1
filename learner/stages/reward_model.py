"""A reward model of pairs (Bradley and Terry 1952): the better conversation of a pair is to be worth more.

    groups -> pairs (best, worst by reward) -> reward of each conversation: a head on the state behind its last token
           -> loss of the pairs -> weight of each conversation (`learner.stages.whole_episodes`) -> one optimizer step

The trunk is the policy, which is no language model afterwards: its checkpoint is written with the head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from learner.algorithm.preferences import PreferenceValue, bradley_terry
from learner.data.batch import MicroBatch
from learner.data.batch_checks import BatchRefused
from learner.data.prepare import Example
from learner.model.reward_head import RewardHead, classifier_of
from learner.stages.epochs import Epochs
from learner.stages.preference import best_and_worst
from learner.stages.settings import RewardModelSettings
from learner.stages.stage import StageLearner
from learner.stages.whole_episodes import weigh
from rollout.wire.metrics import Row
from rollout.wire.trajectory import Group, Trajectory

Pair = tuple[Trajectory, Trajectory]


class RewardModel:
    """The stage of kind "reward_model". A group's pair is its episode of the most reward and that of the least."""

    def __init__(self, settings: RewardModelSettings) -> None:
        self._settings = settings

    def begin(self, learner: StageLearner, groups: Sequence[Group]) -> int:
        """Make head and pairs, and set some aside; returns the optimizer steps of all epochs."""
        settings = self._settings
        self._learner = learner
        try:
            classifier_of(learner.policy.model_type)
        except ValueError as error:
            raise BatchRefused(str(error)) from error
        pairs = best_and_worst(groups)
        self._margins_P = torch.tensor(
            [settings.margin * (better.reward - worse.reward) for better, worse in pairs], dtype=torch.float64
        )
        self._last_tokens = {int(_tokens(each)[-1]) for pair in pairs for each in pair}
        self._pairs = [(_behind(better), _behind(worse)) for better, worse in pairs]
        self._learned, self._heldout = _apart(pairs, settings.heldout_share, learner.rng)
        self._steps = settings.steps(len(self._learned))
        self._head = learner.module("reward", RewardHead(learner.policy.width))
        self._optimizer = learner.optimizer(settings.optim, self._steps)
        self._head_optimizer = learner.optimizer(settings.head_optim, self._steps, of=[self._head])
        self._epochs = Epochs(len(self._learned), settings.epochs, settings.pairs_per_step, learner.rng)
        return self._steps

    def advance(self, step: int) -> Row:
        """One optimizer step on the next `pairs_per_step` pairs; the last one of an epoch judges those set aside."""
        chosen = self._epochs.chosen(step, self._learned)
        rewards_P2 = self._rewards(chosen).requires_grad_()
        loss_P, statistics = self._loss(chosen, rewards_P2)
        examples = [example for place in chosen for example in self._pairs[place]]
        weigh(examples, rewards_P2, loss_P.mean())
        row = self._optimizer.step(examples, self._weighed, beside={"head": self._head_optimizer})
        if step + 1 == self._steps:
            self._learner.policy.make_reward_model(self._head, self._last_tokens)
        return {
            **row,
            **{name: float(values_P.mean()) for name, values_P in statistics.items()},
            **(self._judged() if step + 1 == self._steps or self._ends_epoch(step) else {}),
            "loss": float(loss_P.detach().mean()),
            "epoch": float(self._epochs.epoch(step)),
        }

    def _ends_epoch(self, step: int) -> bool:
        return self._epochs.epoch(step + 1) > self._epochs.epoch(step)

    def _judged(self) -> Row:
        """Loss and accuracy of the pairs that were set aside."""
        if not self._heldout:
            return {}
        loss_P, statistics = self._loss(self._heldout, self._rewards(self._heldout))
        return {
            "heldout_loss": float(loss_P.mean()),
            "heldout_accuracy": float(statistics["reward_accuracy"].mean()),
        }

    def _loss(self, places: Sequence[int], rewards_P2: Tensor) -> PreferenceValue:
        better_P, worse_P = rewards_P2.unbind(1)
        return bradley_terry(better_P, worse_P, self._margins_P[list(places)], self._settings.centre)

    def _rewards(self, places: Sequence[int]) -> Tensor:
        """Rewards of both conversations of these pairs, without gradient: float64 [P, 2]."""
        examples = [example for place in places for example in self._pairs[place]]
        values = self._learner.values(examples, self._head)
        found = [float(each.before_N[0]) for each in values]
        return torch.tensor(found, dtype=torch.float64).reshape(-1, 2)

    def _weighed(self, micro: MicroBatch) -> tuple[Tensor, Mapping[str, Tensor]]:
        rewards_N: Tensor = self._head(self._learner.policy.hidden(micro))
        return -micro.advantages_N * rewards_N, {}


def _apart(pairs: Sequence[Pair], share: float, rng: np.random.Generator) -> tuple[list[int], list[int]]:
    """The places of pairs to learn from and of those set aside; pairs of one prompt stay together."""
    by_prompt: dict[bytes, list[int]] = {}
    for place, (better, _) in enumerate(pairs):
        by_prompt.setdefault(better.turns[0].prompt_ids.tobytes(), []).append(place)
    prompts = list(by_prompt.values())
    order = rng.permutation(len(prompts))
    count = round(share * len(prompts))
    learned, heldout = (
        sorted(place for prompt in part for place in prompts[prompt])
        for part in (order[count:].tolist(), order[:count].tolist())
    )
    return learned, heldout


def _tokens(episode: Trajectory) -> np.ndarray:
    """All tokens of the last segment: the conversation as the model read and wrote it."""
    turns = [turn for turn in episode.turns if turn.segment == episode.turns[-1].segment]
    return np.concatenate([ids for turn in turns for ids in (turn.prompt_ids, turn.action_ids)])


def _behind(episode: Trajectory) -> Example:
    """The conversation as a prompt, and a dummy token: the state before that is the one behind the conversation."""
    last = episode.turns[-1]
    zero = np.zeros(1, np.int32)
    whole = replace(
        last,
        prompt_ids=_tokens(episode),
        action_ids=zero,
        behavior_logprobs=zero.astype(np.float32),
        versions=zero,
    )
    return Example.of(replace(episode, turns=(whole,)))
