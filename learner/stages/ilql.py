"""Implicit Q-learning for language models (Snell et al. 2022), and the policy of its values by weighted regression.

    episodes -> r + gamma V(next state)                       one pass without gradient
             -> Q, V of every sampled token, log pi of it     one pass of the policy's trunk, heads on its hidden states
             -> TD loss of Q, expectile loss of V towards the slow copy of Q, conservative loss of Q
              + -min(exp((Q - V) / temperature), limit) log pi    advantage-weighted regression (Peng et al. 2019)

The next state may lie in another segment, and so in another packed row: targets have a pass of their own. All losses
reach the trunk, as in the paper; with `detach` that of the policy alone. The slow copy is of the Q heads: the trunk has
none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from math import inf

import torch
from torch import Tensor

from learner.algorithm.values import (
    advantage_weighted_loss,
    advantage_weights,
    bellman_targets,
    conservative_loss,
    expectile_loss,
    td_loss,
)
from learner.data.batch import MicroBatch
from learner.data.batch_checks import BatchRefused
from learner.data.prepare import Example
from learner.model.value_heads import ActionValues, StateValue
from learner.parallel.auxiliary import AuxiliaryModule
from learner.stages.epochs import Epochs
from learner.stages.settings import IlqlSettings
from learner.stages.stage import StageLearner
from rollout.wire.metrics import Row
from rollout.wire.trajectory import Group


class Ilql:
    """The stage of kind "ilql". Every trainable episode is one example."""

    def __init__(self, settings: IlqlSettings) -> None:
        self._settings = settings

    def begin(self, learner: StageLearner, groups: Sequence[Group]) -> int:
        """Make the heads and draw the order of every epoch; returns the optimizer steps of all epochs."""
        settings = self._settings
        self._learner = learner
        self._examples = [Example.of(episode) for group in groups for episode in group.trainable]
        if any(example.episode.sides_K for example in self._examples):
            raise BatchRefused(
                "a stage of kind 'ilql' learns values of one player; an episode of self-play has two"
            )
        steps = settings.steps(len(self._examples))
        if settings.warmup_steps >= steps:
            raise BatchRefused(
                f"warmup_steps={settings.warmup_steps} leaves the policy none of the stage's steps, which are {steps}; "
                "lower it, or raise epochs"
            )
        self._make_heads()
        self._optimizer = learner.optimizer(settings.optim, steps)
        self._value_optimizer = learner.optimizer(settings.value_optim, steps, of=[self._q, self._v])
        self._epochs = Epochs(len(self._examples), settings.epochs, settings.episodes_per_step, learner.rng)
        return steps

    def advance(self, step: int) -> Row:
        """One optimizer step on the next `episodes_per_step` episodes of the epoch; its last step may have fewer."""
        examples = self._epochs.chosen(step, self._examples)
        self._imitates = step < self._settings.warmup_steps
        self._set_targets(self._learner.share(examples))
        row = self._optimizer.step(examples, self._loss, beside={"value": self._value_optimizer})
        if not row["skipped_step"]:
            self._q_target.follow(self._q, self._settings.target_rate)
        return {**_with_effective_samples(row), "epoch": float(self._epochs.epoch(step))}

    def _make_heads(self) -> None:
        """Two Q heads, their slow copy and a V head, alike on all ranks."""
        policy = self._learner.policy
        random = torch.Generator().manual_seed(int(self._learner.rng.integers(2**62)))
        hidden = self._settings.hidden_width(policy.width)
        values = ActionValues(policy.width, hidden, policy.vocab_size, random)
        state = StateValue(policy.width, hidden, random)
        self._q_target = self._learner.module("q_target", deepcopy(values).requires_grad_(False))
        self._q = self._learner.module("q", values)
        self._v = self._learner.module("v", state)

    def _set_targets(self, examples: Sequence[Example]) -> None:
        """What Q is to become at every sampled token, by the values as they stand."""
        for example, values in zip(examples, self._learner.values(examples, self._v), strict=True):
            episode = replace(example.episode, values=values)
            example.columns = {"value_targets": bellman_targets(episode, self._settings.gamma)}

    def _loss(self, micro: MicroBatch) -> tuple[Tensor, Mapping[str, Tensor]]:
        settings, targets_N = self._settings, micro.value_targets_N
        assert targets_N is not None
        logprobs_N, entropy_N, hidden_ND = self._learner.policy.read(micro, 1.0)
        seen_ND = hidden_ND.detach() if settings.detach else hidden_ND
        q_2N, q_logprobs_2N = self._action_values(self._q, seen_ND, micro)
        v_N = self._v(seen_ND)
        with torch.no_grad():
            slow_N = self._action_values(self._q_target, hidden_ND, micro)[0].amin(0)
        td_N = td_loss(q_2N, targets_N).sum(0)
        expectile_N = expectile_loss(slow_N - v_N, settings.expectile)
        cql_N = conservative_loss(q_logprobs_2N).sum(0)
        advantages_N = slow_N - v_N.detach()
        temperature = inf if self._imitates else settings.temperature
        weights_N = advantage_weights(advantages_N, temperature, settings.weight_limit)
        policy_N = advantage_weighted_loss(logprobs_N, weights_N)
        values_N = td_N + expectile_N + settings.cql * cql_N
        statistics = {
            "entropy": entropy_N,
            "q": q_2N.mean(0),
            "v": v_N,
            "advantage": advantages_N,
            "td_error": (targets_N - q_2N).abs().mean(0),
            "td_loss": td_N,
            "expectile_loss": expectile_N,
            "cql_loss": cql_N,
            "policy_loss": policy_N,
            "policy_weight": weights_N,
            "squared_policy_weight": weights_N.square(),
        }
        loss_N = policy_N + settings.value_coefficient * values_N
        return loss_N, {name: each_N.detach() for name, each_N in statistics.items()}

    def _action_values(
        self, heads: AuxiliaryModule, hidden_ND: Tensor, micro: MicroBatch
    ) -> tuple[Tensor, Tensor]:
        chunk = self._learner.policy.vocab_chunk(len(hidden_ND))
        found: tuple[Tensor, Tensor] = heads(hidden_ND, micro.targets_N, chunk)
        return found


def _with_effective_samples(row: Row) -> Row:
    """The effective sample size of the policy's weights as a share of the tokens: (sum w)^2 / (N sum w^2)."""
    kept = {name: value for name, value in row.items() if name != "squared_policy_weight"}
    if not row.get(
        "squared_policy_weight"
    ):  # no token was scored, or every weight is below the smallest float
        return kept
    return {**kept, "effective_samples": row["policy_weight"] ** 2 / row["squared_policy_weight"]}
