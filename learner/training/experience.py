"""A step's experience: each trainable episode with all that is known of its tokens before the first update.

That is, in the order in which it is computed: the reference policy's logprobs, rewards less what they and constraints
take from them, the critic's values, advantages, the teacher's signal, and the policy's own logprobs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from learner.algorithm import constraints
from learner.algorithm.regularizers import divergence
from learner.data.batch import MicroBatch
from learner.data.batch_checks import BatchRefused, require_rewards
from learner.data.prepare import Example, of_tokens
from learner.model.policy import Policy
from learner.settings import LearnerSettings
from learner.training.critic import Critic
from learner.training.reference_policy import Reference
from learner.training.teacher import Teacher
from rollout.wire.trajectory import Float32Array, Group


@dataclass(frozen=True, slots=True)
class ExperienceMaker:
    """A learner's models as they are before a step's first update. temperature: that of the sampling.

    Ranks compute together, each for the groups of its own share.
    """

    settings: LearnerSettings
    temperature: float
    policy: Policy
    critic: Critic | None
    reference: Reference | None
    teacher: Teacher | None

    def make(self, groups: Sequence[Group], multipliers: constraints.Multipliers) -> list[Example]:
        """The examples of groups, in their order. BatchRefused where rewards or advantages are not finite.

        multipliers: of the constraints. A critic that learns by itself does so here.
        """
        algorithm = self.settings.algorithm
        by_group = [[Example.of(t, algorithm.overlong, g.reuse > 0) for t in g.trainable] for g in groups]
        examples = [*chain.from_iterable(by_group)]
        self._refer(examples)
        require_rewards(examples, self.policy.ranks)
        for example in examples if multipliers else ():
            example.episode = constraints.priced(example.episode, multipliers)
        if self.critic is not None:
            wanted = self.temperature if algorithm.fixes_proximal else None
            self.critic.look(examples, self.settings.tokens_per_microbatch, wanted)
        self._estimate(by_group)
        if self.teacher is not None:  # what a token costs against the teacher is the same for either side
            self.teacher.judge(examples, self._logprobs)
        if algorithm.fixes_proximal:
            self._fix_proximal(examples)
        return examples

    def _refer(self, examples: Sequence[Example]) -> None:
        """The reference policy's logprobs, and what it takes from rewards."""
        kl = self.settings.algorithm.kl
        if self.reference is None:
            return
        with self.reference.beside(self.policy) as reference:
            logprobs = self._logprobs(examples, reference)
        for example, reference_N in zip(examples, logprobs, strict=True):
            example.columns["reference_logprobs"] = reference_N
            if kl is not None and kl.where == "reward":
                behavior_N = torch.from_numpy(example.behavior_logprobs_N)
                apart_N = divergence(behavior_N, torch.from_numpy(reference_N), kl.estimator, kl.cap)
                costs_N = (-kl.coefficient * apart_N).numpy()
                episode = example.episode  # a token costs the side that said it
                example.episode = replace(episode, token_rewards_N=costs_N * episode.sides_N)

    def _estimate(self, by_group: Sequence[Sequence[Example]]) -> None:
        """Advantages, and the targets of a critic that does not learn by itself."""
        estimator, examples = self.settings.algorithm.advantage, [*chain.from_iterable(by_group)]
        episodes = [[example.episode for example in siblings] for siblings in by_group]
        try:
            if self.critic is None or self.critic.learns_by_itself:
                advantages = estimator(episodes, self.policy.ranks)
            else:
                advantages, targets = estimator.with_targets(episodes, self.policy.ranks)
                for example, targets_N in zip(examples, chain.from_iterable(targets), strict=True):
                    assert example.episode.values is not None
                    example.columns |= {"values": example.episode.values.before_N, "value_targets": targets_N}
        except ValueError as error:
            raise BatchRefused(str(error)) from error
        for example, advantages_N in zip(examples, chain.from_iterable(advantages), strict=True):
            example.advantages_N = advantages_N * example.episode.sides_N

    def _fix_proximal(self, examples: Sequence[Example]) -> None:
        """Those logprobs, unless they came with values. What will be skipped needs none."""
        if not self.policy.ranks.most(
            sum("proximal_logprobs" not in example.columns for example in examples)
        ):
            return
        skip = self.settings.algorithm.skip_zero_advantage
        needed = [example for example in examples if example.advantages_N.any() or not skip]
        found = self._logprobs(needed, self.policy)
        for example in examples:
            example.columns["proximal_logprobs"] = np.zeros(example.trajectory.num_sampled, np.float32)
        for example, logprobs_N in zip(needed, found, strict=True):
            example.columns["proximal_logprobs"] = logprobs_N

    def _logprobs(self, examples: Sequence[Example], policy: Policy) -> list[Float32Array]:
        """A policy's logprobs of every sampled token, float32 [N] for each example."""

        @torch.no_grad()
        def logprobs(micro: MicroBatch) -> Tensor:
            return policy.score(micro.to(policy.device), self.temperature)[0]

        return of_tokens(examples, logprobs, self.settings.tokens_per_microbatch, self.policy.ranks)
