"""The largest step a learner can meet, made before the first one: what does not fit into memory fails at the start."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from learner.batch import Batch, MicroBatch, longest_row
from learner.critic import critic_of
from learner.model import ModelError, Policy
from learner.optim import Optimizer
from learner.reference import Reference
from learner.settings import LearnerSettings
from learner.step import Auxiliary, PolicyObjective, train_step


def rehearse(
    policy: Policy,
    optimizer: Optimizer,
    settings: LearnerSettings,
    longest: int,
    temperature: float,
    total_steps: int | None = None,
) -> None:
    """Make a step of the largest row there can be, up to where it would be applied.

    With all that a step holds: a critic and a reference, which begin with the first one, are made for as long as this
    lasts, and the moments of both optimizers have their room. Weights and generators stay as they are.

    longest: tokens of the longest sequence; total_steps: of the optimizers. ModelError says what to lower.
    """
    size = settings.tokens_per_microbatch
    row = longest_row(min(longest, policy.context), size)
    cuda = [policy.device] if policy.device.type == "cuda" else []
    try:
        # A critic's head draws its first weights, which are then set to zero.
        with torch.random.fork_rng(devices=cuda):
            _step(policy, optimizer, settings, row, temperature, total_steps)
    except torch.OutOfMemoryError as error:
        raise ModelError(
            f"a row of {len(row.input_ids_T)} tokens does not fit into the learner's memory "
            f"({str(error).splitlines()[0]}); lower learner.tokens_per_microbatch={size} or "
            f"rollout.context_tokens={longest}, or set learner.model.gradient_checkpointing = true"
        ) from error


def _step(
    policy: Policy,
    optimizer: Optimizer,
    settings: LearnerSettings,
    row: MicroBatch,
    temperature: float,
    total_steps: int | None,
) -> None:
    """A step to which nobody agrees, of this row alone."""
    algorithm, nothing_N = settings.algorithm, torch.zeros_like(row.weights_N)
    row = replace(row, reference_logprobs_N=nothing_N, values_N=nothing_N, value_targets_N=nothing_N)
    batch = Batch((row,), len(nothing_N), 1, 0)
    reference = Reference(settings.model, policy.ranks)
    if algorithm.kl:
        reference.copy(policy)
    critic = critic_of(algorithm.critic, policy, total_steps) if algorithm.critic else None
    room = [each.moments_to_come() for each in (optimizer, *([critic.optimizer] if critic else []))]

    def held_back(
        batch: Batch, *, auxiliary: Auxiliary | None = None, agree: Callable[[], bool] = lambda: False
    ) -> dict[str, float]:
        objective = PolicyObjective(algorithm)
        return train_step(policy, optimizer, batch, objective, temperature, auxiliary, lambda: False)

    optimizer.zero_grad()  # gradients stay from step to step: they are there when a critic's pass comes
    if critic is None:
        held_back(batch)
    else:
        critic.step_with(held_back, batch, batch)
    optimizer.zero_grad()
    del room, reference
