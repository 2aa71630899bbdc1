"""A loss of numbers that whole episodes have, made into an optimizer step of episodes that are dealt and packed singly.

Let s be a number of each episode, such as its log-probability. The gradient of a loss L(s) is the sum over episodes of
(dL/ds) times the gradient of s: with dL/ds as its weight every episode can be learned alone, and those that a loss
compares need not lie in one micro-batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from learner.data.batch import MicroBatch
from learner.data.prepare import Example
from learner.model.policy import Policy
from learner.stages.stage import StageLearner


def total_logprobs(learner: StageLearner, examples: Sequence[Example]) -> Tensor:
    """The policy's log-probability of all that each episode sampled, in nats: float64 [E], without gradient."""
    found = [float(logprobs_N.sum(dtype=np.float64)) for logprobs_N in learner.logprobs(examples)]
    return torch.tensor(found, dtype=torch.float64)


def weigh(examples: Sequence[Example], numbers: Tensor, loss: Tensor) -> None:
    """Set every episode's advantage to -dL/ds, for a token loss of -advantage times s.

    numbers: s of the episodes in this order, of any shape, which the loss (one number) was computed of.
    """
    (pull,) = torch.autograd.grad(loss, numbers)
    # An optimizer's step averages over tokens: that is undone, so that episodes weigh as the loss says.
    tokens = sum(example.trajectory.num_sampled for example in examples)
    for example, weight in zip(examples, pull.flatten().tolist(), strict=True):
        example.advantages_N[:] = -weight * tokens


def weighed_logprobs(policy: Policy, micro: MicroBatch) -> tuple[Tensor, Mapping[str, Tensor]]:
    """The token loss [N] where s is the log-probability of an episode, and the entropy."""
    logprobs_N, entropy_N = policy.score(micro, 1.0)
    return -micro.advantages_N * logprobs_N, {"entropy": entropy_N.detach()}
