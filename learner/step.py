"""One optimizer step over packed micro-batches, the same for every objective."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from learner.algorithm import AlgorithmSettings
from learner.batch import Batch, MicroBatch
from learner.losses import cross_entropy_loss, kl_k3, policy_loss
from learner.model import Policy
from learner.optim import Optimizer

# (micro-batch, logprobs [N], entropies [N]) -> (loss [N] with gradient, per-token statistics [N] without)
Objective = Callable[[MicroBatch, Tensor, Tensor], tuple[Tensor, dict[str, Tensor]]]


@dataclass(frozen=True, slots=True)
class PolicyObjective:
    """The clipped policy-gradient surrogate of learner/losses.py, with an entropy bonus if one is set."""

    settings: AlgorithmSettings

    def __call__(
        self, micro: MicroBatch, logprobs_N: Tensor, entropy_N: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        settings = self.settings
        behavior_N = micro.behavior_logprobs_N
        proximal_N = micro.proximal_logprobs_N
        if proximal_N is None:  # the learner's own before this step are what it computes in this step
            proximal_N = behavior_N if settings.proximal == "behavior" else logprobs_N.detach()
        loss_N, flags = policy_loss(
            logprobs_N,
            proximal_N,
            behavior_N,
            micro.advantages_N,
            settings.clip_low,
            settings.clip_high,
            settings.tis_cap,
        )
        if settings.entropy_bonus > 0:
            loss_N = loss_N - settings.entropy_bonus * entropy_N
        with torch.no_grad():
            stats = {
                "entropy": entropy_N,
                "kl": kl_k3(logprobs_N, behavior_N),
                "behavior_gap": (logprobs_N - behavior_N).abs(),
                "clip_fraction": flags["clipped"],
                "tis_capped_fraction": flags["tis_capped"],
            }
        return loss_N, stats


def cross_entropy_objective(
    micro: MicroBatch, logprobs_N: Tensor, entropy_N: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Imitation: the negative log-likelihood of the recorded actions."""
    return cross_entropy_loss(logprobs_N), {"entropy": entropy_N}


def train_step(
    policy: Policy, optimizer: Optimizer, batch: Batch, objective: Objective, temperature: float
) -> dict[str, float]:
    """Forward and backward over every micro-batch, then one clipped optimizer step.

    The loss is the objective's sum over all sampled tokens divided by their number in the WHOLE batch,
    skipped sequences included. Metrics: "loss"; the objective's statistics as means over the scored tokens;
    "grad_norm", "learning_rate", "skipped_step" (1.0: the norm was not finite, nothing was changed);
    "tokens_trained" (inputs computed), "tokens_scored" and "tokens_sampled" (the denominator).
    """
    optimizer.zero_grad()
    sums: dict[str, Tensor] = {}
    tokens = scored = 0
    for micro in batch.micro_batches:
        on_device = micro.to(policy.device)
        logprobs_N, entropy_N = policy.score(on_device, temperature)
        loss_N, stats = objective(on_device, logprobs_N, entropy_N)
        loss = loss_N.sum() / batch.sampled_tokens
        loss.backward()
        for name, value_N in {"loss": loss, **stats}.items():
            sums[name] = sums.get(name, torch.zeros((), device=policy.device)) + value_N.detach().sum()
        tokens += len(micro.input_ids_T)
        scored += len(micro.targets_N)
    report = optimizer.step()
    total_loss = float(sums.pop("loss", torch.zeros(())))
    return {
        "loss": total_loss,
        **{name: float(value) / scored for name, value in sums.items()},
        "grad_norm": report.grad_norm,
        "learning_rate": report.learning_rate,
        "skipped_step": 0.0 if report.applied else 1.0,
        "tokens_trained": float(tokens),
        "tokens_scored": float(scored),
        "tokens_sampled": float(batch.sampled_tokens),
    }
