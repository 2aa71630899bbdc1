"""The largest step a learner can meet, tried before the first one: what does not fit into memory fails at the start.

On a GPU the step is computed. On a CPU that takes as long as a step of training, and a host that runs out of memory
raises nothing: it kills. There a step of one short sequence is computed, and what autograd will hold of the largest row
is told by short ones and compared with the memory that is free.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import psutil
import torch

from learner.data.batch import Batch, MicroBatch, longest_row
from learner.model.footprint import saved_by, shape_of
from learner.model.loading import ModelError
from learner.model.policy import Policy
from learner.model.saved_tensors import SavedTensors
from learner.settings import LearnerSettings
from learner.training.critics import critic_of
from learner.training.memory_estimate import host_share, settled
from learner.training.optim import Optimizer
from learner.training.reference_policy import Reference
from learner.training.step import Auxiliary, PolicyObjective, train_step

_SHORT = 32  # tokens of a sequence that is computed on a CPU


def rehearse(
    policy: Policy,
    optimizer: Optimizer,
    settings: LearnerSettings,
    longest: int,
    temperature: float,
    total_steps: int | None = None,
) -> None:
    """Make a step of the largest row there can be (on a CPU: of a short one), up to where it would be applied.

    With all that a step holds: a critic and a reference, which begin with the first one, are made for as long as this
    lasts, and the moments of both optimizers have their room. Weights and generators stay as they are.

    longest: tokens of the longest sequence; total_steps: of the optimizers. ModelError says what to lower.
    """
    size, longest_here = settings.tokens_per_microbatch, min(longest, policy.context)
    row = longest_row(longest_here, size)
    on_cpu = policy.device.type == "cpu"
    computed = longest_row(min(longest_here, _SHORT), 1) if on_cpu else row
    try:
        # A critic's head draws its first weights, which are then set to zero.
        with torch.random.fork_rng(devices=[] if on_cpu else [policy.device]):
            if on_cpu:
                _require_free(_held_bytes(policy, row, computed, temperature))
            _step(policy, optimizer, settings, computed, temperature, total_steps)
    except torch.OutOfMemoryError as error:
        raise ModelError(
            f"a row of {len(row.input_ids_T)} tokens does not fit into the learner's memory "
            f"({str(error).splitlines()[0]}); lower learner.tokens_per_microbatch={size} or "
            f"rollout.context_tokens={longest}, or set learner.model.gradient_checkpointing = true"
        ) from error


def settle(
    policy: Policy, settings: LearnerSettings, longest: int, teacher: Policy | None = None
) -> LearnerSettings:
    """The settings with what is decided by memory, for the policy too; the same on all ranks, a collective call.

    longest: tokens of the longest sequence.
    """
    ranks = policy.ranks
    if ranks.size == 1:
        return settings
    if policy.device.type == "cuda":
        own = torch.cuda.get_device_properties(policy.device).total_memory
    else:
        own = host_share(ranks.size)
    saved = saved_by(policy.model.config, settings.model.dtype, ranks.context.size)
    shape, beside = shape_of(policy.model), None if teacher is None else shape_of(teacher.model)
    least = min(ranks.gather(own, everyone=True))
    found = settled(settings, shape, saved, longest, least, beside)
    policy.settings = found.model
    return found


def _held_bytes(policy: Policy, row: MicroBatch, short: MicroBatch, temperature: float) -> int:
    """What autograd holds of a row between forward and backward, at least: a longer sequence holds as much a token.

    What does not grow with the row (weights, and copies of them in another type) is held of two short sequences as of
    one, and drops out.
    """
    tokens = len(short.input_ids_T)
    held = []
    for each in (short, longest_row(tokens + 1, 2 * tokens)):
        with (saved := SavedTensors()):
            policy.score(each, temperature)
        held.append(saved.nbytes)
    return (held[1] - held[0]) * len(row.input_ids_T) // tokens


def _require_free(wanted_bytes: int) -> None:
    """Raise OutOfMemoryError where this host has less memory left, swap included."""
    free_bytes = psutil.virtual_memory().available + psutil.swap_memory().free
    if wanted_bytes > free_bytes:
        raise torch.OutOfMemoryError(
            f"it takes at least {wanted_bytes / 2**30:.3g} GiB more of this host's memory, "
            f"of which {free_bytes / 2**30:.3g} GiB are free"
        )


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
    row = replace(
        row,
        reference_logprobs_N=nothing_N,
        teacher_logprobs_N=nothing_N,
        values_N=nothing_N,
        value_targets_N=nothing_N,
    )
    batch = Batch((row,), len(nothing_N), 1, 0)
    reference = Reference(settings.model, policy.ranks)
    if algorithm.needs_reference:
        reference.copy(policy)
    critic = critic_of(algorithm.critic, policy, total_steps) if algorithm.critic else None
    room = [each.moments_to_come() for each in (optimizer, *([critic.optimizer] if critic else []))]

    def held_back(
        batch: Batch, *, auxiliary: Auxiliary | None = None, agree: Callable[[], bool] = lambda: False
    ) -> dict[str, float]:
        objective = PolicyObjective(algorithm)
        return train_step(policy, optimizer, batch, objective, temperature, auxiliary, lambda: False)

    optimizer.grad_norm()  # gradients stay until they are overwritten: they are there when a critic's pass comes
    if critic is None:
        held_back(batch)
    else:
        critic.optimizer.zero_grad()
        critic.step_with(held_back, batch, batch)
    optimizer.zero_grad()
    del room, reference
