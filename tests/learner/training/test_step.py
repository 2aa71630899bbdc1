from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from learner.algorithm.algorithm import AlgorithmSettings
from learner.algorithm.losses import clipped, cross_entropy
from learner.algorithm.schedule import OptimSettings
from learner.data.batch import Batch, MicroBatch, TokenSequence, pack, sequences_of
from learner.model.policy import Policy
from learner.settings import ModelSettings
from learner.training.optim import Optimizer
from learner.training.step import PolicyObjective, Stats, train_step
from rollout.wire.trajectory import Group
from tests import reference

SETTINGS = AlgorithmSettings(skip_zero_advantage=False)
TEMPERATURE = 0.8


@pytest.fixture
def policy(tiny: Path) -> Policy:
    return Policy(ModelSettings(path=str(tiny)))


@pytest.fixture
def sequences(group_of: Callable[..., Group]) -> list[TokenSequence]:
    advantages = [1.0, -0.5, 0.0, 0.7, 0.0, -1.2]
    episodes = group_of(0, advantages, turns=3).trajectories
    weight = 1 / sum(episode.num_sampled for episode in episodes)
    return [
        s
        for episode, advantage in zip(episodes, advantages, strict=True)
        for s in sequences_of(episode, np.full(episode.num_sampled, advantage, np.float32), weight)
    ]


def _gradients(policy: Policy, batch: Batch) -> list[Tensor]:
    """The gradients one train_step leaves behind; the weights stay."""
    optimizer = Optimizer(policy.parameters(), OptimSettings(learning_rate=1e-30, max_grad_norm=1e9))
    train_step(policy, optimizer, batch, PolicyObjective(SETTINGS), TEMPERATURE)
    return [p.grad.clone() for p in policy.parameters() if p.grad is not None]


def _same(left: list[Tensor], right: list[Tensor]) -> None:
    for one, other in zip(left, right, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)


def test_gradients_are_those_of_a_dense_padded_loss(policy: Policy, sequences: list[TokenSequence]) -> None:
    policy.model.double()
    got = _gradients(policy, pack(sequences, 50, 128))
    policy.model.zero_grad()
    total = sum(s.num_sampled for s in sequences)
    for s in sequences:
        ids_T = torch.from_numpy(s.token_ids_T).long()
        logprobs_TV = (policy.model(ids_T[None], use_cache=False).logits[0] / TEMPERATURE).log_softmax(-1)
        logprobs_T = logprobs_TV[:-1].gather(1, ids_T[1:, None])[:, 0]
        behavior_T, advantages_T = (torch.from_numpy(a[1:]) for a in (s.behavior_logprobs_T, s.advantages_T))
        loss_T, _ = clipped(logprobs_T, behavior_T, advantages_T, 0.2, 0.28)
        ((loss_T * torch.from_numpy(s.sampled_T[1:])).sum() / total).backward()
    _same(got, [p.grad for p in policy.parameters() if p.grad is not None])


@pytest.mark.parametrize("limit", [1, 30, 60])
def test_gradients_do_not_depend_on_the_packing(
    policy: Policy, sequences: list[TokenSequence], limit: int
) -> None:
    policy.model.double()
    whole = _gradients(policy, pack(sequences, 10_000, 128))
    order = np.random.default_rng(limit).permutation(len(sequences))
    _same(_gradients(policy, pack([sequences[i] for i in order], limit, 128)), whole)


def test_gradients_do_not_depend_on_checkpointing(tiny: Path, sequences: list[TokenSequence]) -> None:
    plain, saving = (
        Policy(ModelSettings(path=str(tiny), gradient_checkpointing=saving)) for saving in (False, True)
    )
    batch = pack(sequences, 60, 128)
    _same(_gradients(saving, batch), _gradients(plain, batch))


def test_skipping_zero_advantages_leaves_the_gradients_alone(
    policy: Policy, sequences: list[TokenSequence]
) -> None:
    policy.model.double()
    kept, skipped = (pack(sequences, 60, 128, skip_zero_advantage=skip) for skip in (False, True))
    assert skipped.skipped_sequences == 2
    _same(_gradients(policy, skipped), _gradients(policy, kept))


@pytest.mark.parametrize("why", ["no advantage", "no advantage, skipped", "masked"])
def test_a_batch_with_nothing_to_learn_from_moves_nothing_whatever_momentum_there_is(
    policy: Policy, sequences: list[TokenSequence], why: str
) -> None:
    optimizer = Optimizer(policy.parameters(), OptimSettings(learning_rate=1e-2, weight_decay=0.1))
    masked = AlgorithmSettings.model_validate({"corrections": [{"kind": "lag", "max_lag": 0}]})
    flat = [replace(s, advantages_T=np.zeros_like(s.advantages_T)) for s in sequences]
    train_step(policy, optimizer, pack(sequences, 60, 128), PolicyObjective(SETTINGS), TEMPERATURE)
    before = [p.detach().clone() for p in policy.parameters()]
    batch = pack(sequences if why == "masked" else flat, 60, 128, skip_zero_advantage=why.endswith("skipped"))
    objective = PolicyObjective(masked, version=1) if why == "masked" else PolicyObjective(SETTINGS)
    metrics = train_step(policy, optimizer, batch, objective, TEMPERATURE)
    assert (metrics["idle_step"], metrics["skipped_step"], metrics["grad_norm"]) == (1.0, 0.0, 0.0)
    assert all(torch.equal(a, b) for a, b in zip(before, policy.parameters(), strict=True))
    assert optimizer.steps == 1
    row = train_step(policy, optimizer, pack(sequences, 60, 128), PolicyObjective(SETTINGS), TEMPERATURE)
    assert (row["idle_step"], optimizer.steps) == (0.0, 2)


def test_tokens_that_were_not_sampled_have_no_gradient(
    policy: Policy, sequences: list[TokenSequence]
) -> None:
    # The loss reaches the row through the hidden states just before sampled tokens alone.
    (row,) = pack(sequences, 10_000, 128).micro_batches
    kept: list[Tensor] = []
    hidden = policy.model.base_model.register_forward_hook(
        lambda _m, _i, out: kept.append(out.last_hidden_state)
    )
    logprobs_N, _ = policy.score(row, 1.0)
    hidden.remove()
    (grad,) = torch.autograd.grad(logprobs_N.sum(), kept)
    scored = torch.zeros(len(row.input_ids_T), dtype=torch.bool)
    scored[row.score_index_M] = True
    assert not grad[0, ~scored].any()
    assert grad[0, scored].any(1).all()


def test_metrics_equal_a_naive_recomputation(policy: Policy, sequences: list[TokenSequence]) -> None:
    aged = [replace(s, versions_T=np.where(s.sampled_T, place % 3, -1)) for place, s in enumerate(sequences)]
    batch = pack(aged, 60, 128)
    with torch.no_grad():
        scores = [(policy.score(row, TEMPERATURE), row) for row in batch.micro_batches]
    logprobs = torch.cat([s[0] for s, _ in scores])
    behavior = torch.cat([row.behavior_logprobs_N for _, row in scores])
    optimizer = Optimizer(policy.parameters(), OptimSettings(learning_rate=1e-3))
    metrics = train_step(policy, optimizer, batch, PolicyObjective(SETTINGS, version=2), TEMPERATURE)
    ratio = (logprobs - behavior).exp()
    assert metrics["behavior_gap"] == pytest.approx((logprobs - behavior).abs().mean().item(), rel=1e-4)
    assert metrics["kl"] == pytest.approx((ratio - 1 - ratio.log()).mean().item(), rel=1e-3, abs=1e-6)
    lags = 2 - torch.cat([row.versions_N for _, row in scores])
    assert metrics["effective_samples"] == pytest.approx(reference.effective_share(ratio.tolist()), rel=1e-4)
    for lag in range(3):
        here = lags == lag
        share = reference.effective_share(ratio[here].tolist())
        gap = (logprobs - behavior)[here].abs().mean().item()
        assert metrics[f"effective_samples_lag_{lag}"] == pytest.approx(share, rel=1e-4)
        assert metrics[f"behavior_gap_lag_{lag}"] == pytest.approx(gap, rel=1e-4)
    assert metrics["entropy"] == pytest.approx(torch.cat([s[1] for s, _ in scores]).mean().item(), rel=1e-4)
    assert (
        metrics["batch_tokens_sampled"] == metrics["tokens_scored"] == sum(s.num_sampled for s in sequences)
    )
    assert metrics["tokens_effective"] == sum(s.num_inputs for s in sequences)
    assert metrics["tokens_processed"] == sum(len(row.input_ids_T) for _, row in scores)
    assert metrics["skipped_step"] == 0.0


def test_a_non_finite_gradient_skips_the_step(policy: Policy, sequences: list[TokenSequence]) -> None:
    broken = [replace(s, behavior_logprobs_T=np.full_like(s.behavior_logprobs_T, np.nan)) for s in sequences]
    before = [p.detach().clone() for p in policy.parameters()]
    optimizer = Optimizer(policy.parameters(), OptimSettings(learning_rate=1.0))
    metrics = train_step(policy, optimizer, pack(broken, 60, 128), PolicyObjective(SETTINGS), 1.0)
    assert metrics["skipped_step"] == 1.0
    assert all(torch.equal(a, b) for a, b in zip(before, policy.parameters(), strict=True))


def test_any_objective_drives_the_step(policy: Policy, sequences: list[TokenSequence]) -> None:
    def likelihood(micro: MicroBatch, logprobs_N: Tensor, entropy_N: Tensor) -> tuple[Tensor, Stats]:
        return cross_entropy(logprobs_N), {}

    optimizer = Optimizer(policy.parameters(), OptimSettings(learning_rate=3e-3))
    batch = pack(sequences, 60, 128)
    losses = [train_step(policy, optimizer, batch, likelihood, 1.0)["loss"] for _ in range(8)]
    assert losses[-1] < losses[0] - 0.2
