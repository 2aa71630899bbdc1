"""One optimizer step over packed micro-batches, the same for every objective."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from learner.algorithm.algorithm import AlgorithmSettings
from learner.algorithm.corrections import ratios
from learner.algorithm.regularizers import divergence
from learner.data.batch import Batch, MicroBatch, level
from learner.model.policy import Policy
from learner.model.router_balance import RouterBalance
from learner.parallel.ranks import ALONE, Ranks
from learner.training.metric_reduce import Means, Part, Ratios, Statistic
from learner.training.optim import Optimizer, subnormals_as_zero
from learner.training.teacher import Teacher
from rollout.wire.metrics import joined
from rollout.wire.own_part import OwnPartRefused

Stats = dict[str, Statistic]
# (micro-batch, logprobs [N], entropies [N]) -> (loss [N] with gradient, statistics without)
Objective = Callable[[MicroBatch, Tensor, Tensor], tuple[Tensor, Stats]]
# The same of (micro-batch, hidden states before its scored tokens [N, D]): a loss beside the objective's
Auxiliary = Callable[[MicroBatch, Tensor], tuple[Tensor, Stats]]

# Summed over optimizer steps, not averaged.
_COUNTS = (
    "tokens_processed",
    "tokens_effective",
    "tokens_scored",
    "batch_tokens_sampled",
    "skipped_step",
    "idle_step",
    "value_skipped_step",
)


@dataclass(frozen=True, slots=True)
class PolicyObjective:
    """The loss of learner/algorithm/algorithm.py for a learner that stands at `version`."""

    settings: AlgorithmSettings
    version: int = 0

    def __call__(self, micro: MicroBatch, logprobs_N: Tensor, entropy_N: Tensor) -> tuple[Tensor, Stats]:
        settings, sequence_N = self.settings, micro.sequence_N
        behavior_N, reference_N = micro.behavior_logprobs_N, micro.reference_logprobs_N
        proximal_N = micro.proximal_logprobs_N
        if proximal_N is None:  # the learner's own before this step are what it computes in this step
            proximal_N = behavior_N if settings.proximal == "behavior" else logprobs_N.detach()
        loss_N, of_loss = settings.loss(logprobs_N, proximal_N, micro.advantages_N, sequence_N)
        stats: Stats = {}
        with torch.no_grad():
            lag_N = self.version - micro.versions_N
            weight_N = torch.ones_like(loss_N)
            for correction in settings.corrections:
                weight_N = weight_N * correction(proximal_N - behavior_N, sequence_N, lag_N)
            stats |= self._statistics(micro, logprobs_N.detach(), entropy_N)
            if settings.corrections:
                stats |= {"correction": weight_N, "masked_fraction": (weight_N == 0).float()}
        loss_N = torch.where(weight_N == 0, 0.0, weight_N * loss_N)
        if settings.kl is not None and reference_N is not None:
            kl_N = divergence(logprobs_N, reference_N, settings.kl.estimator, settings.kl.cap)
            stats["reference_kl"] = kl_N.detach()
            if settings.kl.where == "loss":
                loss_N = loss_N + settings.kl.coefficient * kl_N
        if micro.teacher_logprobs_N is not None and settings.distill is not None:
            stats["distill/kl"] = divergence(logprobs_N.detach(), micro.teacher_logprobs_N, "k1")
            stats["distill/teacher_logprob"] = micro.teacher_logprobs_N
        stats = _joined(stats, of_loss, settings.loss.kind)
        for regularizer in settings.regularizers:
            penalty_N, of_penalty = regularizer(logprobs_N, entropy_N, reference_N, sequence_N)
            loss_N, stats = loss_N + penalty_N, _joined(stats, of_penalty, regularizer.kind)
        if settings.entropy_bonus > 0:
            loss_N = loss_N - settings.entropy_bonus * entropy_N
        return loss_N, stats

    def _statistics(self, micro: MicroBatch, logprobs_N: Tensor, entropy_N: Tensor) -> Stats:
        """Of all scored tokens, and of those of each lag: how far the learner is from what sampled them."""
        behavior_N = micro.behavior_logprobs_N
        gap_N = (logprobs_N - behavior_N).abs()
        ratio_N = ratios(logprobs_N - behavior_N)
        stats: Stats = {
            "entropy": entropy_N.detach(),
            "kl": divergence(behavior_N, logprobs_N, "k3"),
            "behavior_gap": gap_N,
            "effective_samples": Ratios(Part(ratio_N, len(ratio_N))),
        }
        for version, tokens in micro.tokens_by_version.items():
            here_N, lag = micro.versions_N == version, self.version - version
            stats[f"behavior_gap_lag_{lag}"] = Part(torch.where(here_N, gap_N, 0.0), tokens)
            stats[f"effective_samples_lag_{lag}"] = Ratios(Part(torch.where(here_N, ratio_N, 0.0), tokens))
        return stats


def _joined(stats: Stats, more: Mapping[str, Tensor], kind: str) -> Stats:
    if taken := sorted(stats.keys() & more.keys()):
        raise OwnPartRefused(
            f"{kind} returns a statistic {taken[0]!r}, which every step has; give it another name"
        )
    return {**stats, **more}


def train_step(
    policy: Policy,
    optimizer: Optimizer,
    batch: Batch,
    objective: Objective,
    temperature: float,
    auxiliary: Auxiliary | None = None,
    agree: Callable[[], bool] = lambda: True,
    teacher: Teacher | None = None,
) -> dict[str, float]:
    """Forward and backward over every micro-batch, then one clipped optimizer step.

    The loss is that of `accumulate`; `auxiliary` adds to the objective's, token by token, and optimizers of what else
    it teaches are its owner's; so does the divergence from a teacher that is learned over the whole vocabulary. agree:
    asked once the gradients are there, whether what learns beside can make its step too; if not, none is made. Metrics,
    over all ranks: "loss"; the statistics as means over what they hold; "grad_norm", "learning_rate", "skipped_step"
    (1.0: loss or norm was not finite, or not agreed to: nothing was changed), "idle_step" (1.0: no token had anything
    to learn from, nothing was changed); those of `sizes`.
    """

    def loss_of(micro: MicroBatch) -> tuple[Tensor, Stats]:
        against = None if teacher is None else teacher.against(micro)
        logprobs_N, entropy_N, hidden_ND, kl_N = policy.compare(
            micro, temperature, against, hidden=auxiliary is not None
        )
        loss_N, stats = objective(micro, logprobs_N, entropy_N)
        if auxiliary is not None and hidden_ND is not None:
            beside_N, more = auxiliary(micro, hidden_ND)
            loss_N, stats = loss_N + beside_N, {**stats, **more}
        if teacher is not None and kl_N is not None:
            loss_N, stats = (
                loss_N + teacher.settings.coefficient * kl_N,
                stats | {"distill/kl": kl_N.detach()},
            )
        return loss_N, stats

    return optimizer_step(policy, optimizer, batch, loss_of, agree)


def optimizer_step(
    policy: Policy,
    optimizer: Optimizer,
    batch: Batch,
    loss_of: Callable[[MicroBatch], tuple[Tensor, Stats]],
    agree: Callable[[], bool] = lambda: True,
) -> dict[str, float]:
    """The same for any loss of a micro-batch."""
    optimizer.zero_grad()
    loss, means = accumulate(policy, batch, loss_of, policy.balance)
    report = optimizer.step(finite=math.isfinite(loss) and agree())
    made = {
        "loss": loss,
        "grad_norm": report.grad_norm,
        "learning_rate": report.learning_rate,
        "skipped_step": float(not report.finite),
        "idle_step": float(report.idle),
    }
    return joined(made, means, sizes(batch, policy.ranks))


@subnormals_as_zero()
def accumulate(
    policy: Policy,
    batch: Batch,
    loss_of: Callable[[MicroBatch], tuple[Tensor, Stats]],
    balance: RouterBalance | None = None,
) -> tuple[float, dict[str, float]]:
    """Forward and backward over every micro-batch: the loss, and its statistics as means, over all ranks.

    The loss is the sum over all sampled tokens of `loss_of` (of a row on the policy's device: loss [N], statistics)
    times the token's weight, which was set for the WHOLE batch, skipped sequences and other ranks' included; and that
    of the `balance` of a mixture of experts, which the statistics then have as "router_balance".
    """
    taught, balanced = torch.zeros(2, device=policy.device)
    means = Means()
    rows = list(level(batch.micro_batches, policy.ranks))
    if balance is not None:
        balance.count(rows, lambda micro: policy.route(micro.to(policy.device)), policy.ranks)
    for micro in policy.passes(rows):
        on_device = micro.to(policy.device)
        watched: AbstractContextManager[list[Tensor]] = balance.watching() if balance else nullcontext([])
        with watched as logits:
            loss_N, stats = loss_of(on_device)
        loss = (loss_N * on_device.weights_N).sum()
        taught = taught + loss.detach()
        if balance is not None:
            part = balance.of(on_device, logits)
            loss, balanced = loss + balance.coefficient * part, balanced + part.detach()
        loss.backward()
        means.add(stats)
    found, ranks = means.values(policy.ranks), policy.ranks
    of_all = ranks.sums({"loss": float(taught)})["loss"]
    if balance is not None:
        found |= ranks.sums({"router_balance": float(balanced)}, sliced=True)
        of_all += balance.coefficient * found["router_balance"]
    return of_all, found


def merged(steps: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Metrics of several optimizer steps as one: sums of counts, means of everything else."""
    found = {}
    for name in dict.fromkeys(name for step in steps for name in step):
        values = [step[name] for step in steps if name in step]
        found[name] = float(np.sum(values) if name in _COUNTS else np.mean(values))
    return found


def use_threads(count: int) -> None:
    """CPU threads of torch in the calling thread; 0: as they are."""
    # OpenMP keeps the number for each thread, and steps run in whatever thread is free.
    if count:
        torch.set_num_threads(count)


def not_finite(row: Mapping[str, float]) -> str:
    """What to say of an optimizer step with these metrics that was skipped."""
    said = [name for name in ("loss", "grad_norm", "value_loss", "value_grad_norm") if name in row]
    return "an optimizer step is not finite: " + ", ".join(f"{name} {row[name]:g}" for name in said)


def sizes(batch: Batch, ranks: Ranks = ALONE) -> dict[str, float]:
    """Counts over all ranks, in tokens.

    "tokens_processed": inputs of the forward pass, prompts included, a shared prefix once; "tokens_effective": the same
    with every sequence computed alone; "tokens_scored": sampled tokens of these;
    "batch_tokens_sampled": sampled tokens of the batch, those of sequences that were skipped included.
    """
    own = {
        "tokens_processed": float(sum(len(micro.input_ids_T) for micro in batch.micro_batches)),
        "tokens_effective": float(sum(micro.tree.effective_tokens for micro in batch.micro_batches)),
        "tokens_scored": float(sum(len(micro.weights_N) for micro in batch.micro_batches)),
        "batch_tokens_sampled": float(batch.sampled_tokens),
    }
    return ranks.sums(own)
