"""Sequences of a prefix tree are scored, and pull on the weights, as each of them alone through transformers' model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from learner.algorithm.losses import cross_entropy
from learner.data.batch import NOT_SAMPLED, MicroBatch, TokenSequence, pack, row_of
from learner.model.policy import Policy
from learner.settings import ModelSettings
from tests.learner.wide import widened

TEMPERATURE = 0.8
LIMITS = [1, 13, 30, 10_000]  # tokens of a row
Loss = Callable[
    [Tensor, Tensor, Tensor, Tensor], Tensor
]  # (logprobs, entropies, values, advantages) [N] -> [N]
LOSSES: dict[str, Loss] = {
    "policy": lambda logprobs, entropies, values, advantages: (
        -(logprobs + 4.5).exp() * advantages - 0.1 * entropies
    ),
    "sft": lambda logprobs, entropies, values, advantages: cross_entropy(logprobs),
    "preference": lambda logprobs, entropies, values, advantages: -advantages * logprobs,
    "critic": lambda logprobs, entropies, values, advantages: (values - advantages).square(),
}


def _forest(seed: int, count: int = 9) -> list[TokenSequence]:
    """Siblings that part inside and between turns, up to six times on the way; prefixes of others, and duplicates."""
    rng = np.random.default_rng(seed)
    ids: list[list[int]] = []
    for _ in range(count):
        known = ids[rng.integers(len(ids))] if ids and rng.random() < 0.85 else []
        kept = known[: int(rng.integers(0, len(known) + 1))]
        ids.append((kept + rng.integers(5, 99, int(rng.integers(0, 9))).tolist()) or [7])
    ids += [ids[0], ids[-1]]
    return [_sequence([3, *each, int(rng.integers(5, 99))], rng) for each in ids]


def _sequence(ids: list[int], rng: np.random.Generator) -> TokenSequence:
    sampled_T = rng.random(len(ids)) < 0.6
    sampled_T[0], sampled_T[-1] = False, True
    return TokenSequence(
        token_ids_T=np.array(ids, np.int32),
        sampled_T=sampled_T,
        behavior_logprobs_T=np.where(sampled_T, -4.5, 0).astype(np.float32),
        advantages_T=np.where(sampled_T, rng.normal(size=len(ids)), 0).astype(np.float32),
        versions_T=np.where(sampled_T, 0, NOT_SAMPLED).astype(np.int32),
        weight=float(np.float32(rng.random())),
    )


@pytest.fixture(scope="module", params=["full attention", "windows"])
def models(
    request: pytest.FixtureRequest, tiny: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Policy, PreTrainedModel]:
    """A policy, and the same checkpoint in plain transformers; float64."""
    folder = tiny
    if request.param == "windows":
        folder = tmp_path_factory.mktemp("windows")
        shape = {"hidden_size": 32, "intermediate_size": 40, "num_attention_heads": 4, "head_dim": 8}
        torch.manual_seed(0)
        config = Qwen3Config(
            **shape,
            vocab_size=100,
            num_hidden_layers=2,
            num_key_value_heads=2,
            use_sliding_window=True,
            sliding_window=4,
            max_window_layers=1,
            max_position_embeddings=128,
        )
        Qwen3ForCausalLM(config).save_pretrained(folder)
    # transformers' eager attention has a softmax in float32.
    plain: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa")
    policy = Policy(ModelSettings(path=str(folder)))
    widened(policy.model)
    return policy, widened(plain).eval()


def _alone(plain: PreTrainedModel, sequence: TokenSequence) -> tuple[Tensor, Tensor, Tensor]:
    """Logprobs [N], entropies [N] and hidden states [N, D] of one sequence."""
    ids_T = torch.from_numpy(sequence.token_ids_T).long()
    before_N = torch.from_numpy(np.flatnonzero(sequence.sampled_T) - 1)
    hidden_ND = plain.base_model(ids_T[None], use_cache=False).last_hidden_state[0, before_N]
    logprobs_NV = (plain.get_output_embeddings()(hidden_ND) / TEMPERATURE).log_softmax(-1)
    chosen_N = logprobs_NV.gather(1, ids_T[before_N + 1, None])[:, 0]
    return chosen_N, -(logprobs_NV.exp() * logprobs_NV).sum(-1), hidden_ND


def _head(width: int) -> nn.Linear:
    torch.manual_seed(3)
    return nn.Linear(width, 1).double()


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("loss", LOSSES)
def test_values_and_gradients_are_those_of_each_sequence_alone(
    models: tuple[Policy, PreTrainedModel], loss: str, limit: int
) -> None:
    sequences = _forest(len(loss) + limit)
    rows = pack(sequences, limit, 128).micro_batches
    assert sum(len(row.input_ids_T) for row in rows) < sum(s.num_inputs for s in sequences) or limit == 1
    _compare(models, sequences, LOSSES[loss], limit)


@st.composite
def grown(draw: st.DrawFn) -> list[TokenSequence]:
    """Sequences that go on from any place of any earlier one, up to six forks deep, or from nowhere."""
    ids: list[list[int]] = []
    forks: list[int] = []
    for _ in range(draw(st.integers(1, 8))):
        parent = draw(st.integers(-1, len(ids) - 1))
        if parent < 0 or forks[parent] == 6:
            ids.append(draw(st.lists(st.integers(5, 98), min_size=1, max_size=12)))
            forks.append(0)
            continue
        kept = ids[parent][: draw(st.integers(1, len(ids[parent])))]
        ids.append(kept + draw(st.lists(st.integers(5, 98), max_size=9)))
        forks.append(forks[parent] + 1)
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    return [_sequence([3, *each, int(rng.integers(5, 99))], rng) for each in ids]


@settings(max_examples=40, deadline=None)
@given(sequences=grown(), loss=st.sampled_from(sorted(LOSSES)), limit=st.integers(1, 60))
def test_so_they_are_for_any_tree_and_any_cut(
    models: tuple[Policy, PreTrainedModel], sequences: list[TokenSequence], loss: str, limit: int
) -> None:
    _compare(models, sequences, LOSSES[loss], limit)


def _compare(
    models: tuple[Policy, PreTrainedModel], sequences: list[TokenSequence], loss: Loss, limit: int
) -> None:
    policy, plain = models
    heads = _head(policy.width), _head(policy.width)
    for model in (policy.model, plain):
        model.zero_grad()
    expected = {}
    for number, sequence in enumerate(sequences):
        logprobs_N, entropy_N, hidden_ND = _alone(plain, sequence)
        advantages_N = torch.from_numpy(sequence.advantages_T[sequence.sampled_T])
        loss_N = loss(logprobs_N, entropy_N, heads[0](hidden_ND)[:, 0], advantages_N)
        (loss_N * sequence.weight).sum().backward()
        expected[number] = (logprobs_N, entropy_N, loss_N)
    tagged = [replace(s, columns={"values": np.full(len(s.token_ids_T), i)}) for i, s in enumerate(sequences)]
    rows = pack(tagged, limit, 128).micro_batches
    for row in rows:
        logprobs_N, entropy_N, hidden_ND = policy.read(row, TEMPERATURE)
        loss_N = loss(logprobs_N, entropy_N, heads[1](hidden_ND)[:, 0], row.advantages_N)
        (loss_N * row.weights_N).sum().backward()
        assert row.values_N is not None
        numbers = list(dict.fromkeys(row.values_N.int().tolist()))
        for mine, theirs in zip(
            (logprobs_N, entropy_N, loss_N), zip(*(expected[n] for n in numbers), strict=True), strict=True
        ):
            torch.testing.assert_close(mine, torch.cat(theirs), atol=1e-9, rtol=1e-6)
    modules = zip((policy.model, heads[1]), (plain, heads[0]), strict=True)
    pairs = [
        pair for pair in modules for pair in zip(pair[0].parameters(), pair[1].parameters(), strict=True)
    ]
    assert any(other.grad is not None and other.grad.abs().max() > 1e-3 for _, other in pairs)
    for mine, other in pairs:
        assert (mine.grad is None) == (other.grad is None)
        if mine.grad is not None:
            torch.testing.assert_close(mine.grad, other.grad, atol=1e-8, rtol=1e-6)


def test_a_duplicate_costs_nothing_and_counts_twice(models: tuple[Policy, PreTrainedModel]) -> None:
    policy, _ = models
    one = _forest(1)[-1]
    single, double = row_of([one]), row_of([one, one])
    assert len(double.input_ids_T) == len(single.input_ids_T) and len(double.targets_M) == len(
        single.targets_M
    )
    found = [_pull(policy, row) for row in (single, double)]
    assert len(found[1][0]) == 2 * len(found[0][0])
    for mine, twice in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(2 * mine, twice)


def _pull(policy: Policy, row: MicroBatch) -> tuple[Tensor, list[Tensor]]:
    policy.model.zero_grad()
    logprobs_N, _ = policy.score(row, 1.0)
    logprobs_N.sum().backward()
    return logprobs_N.detach(), [p.grad.clone() for p in policy.parameters() if p.grad is not None]


@pytest.mark.parametrize("prompt", [10, 90], ids=["short prompt", "long prompt"])
def test_no_branch_sees_another(models: tuple[Policy, PreTrainedModel], prompt: int) -> None:
    policy, _ = models
    rng = np.random.default_rng(0)
    opening, later = rng.integers(5, 99, prompt).tolist(), rng.integers(5, 99, 6).tolist()
    # Two answers to the prompt, and two that part later.
    branches = [[10], [11], [12, *later, 20], [12, *later, 21]]
    ends = [rng.integers(5, 99, size).tolist() for size in (7, 7, 4, 9)]
    made = [_sequence(opening + b + e, np.random.default_rng(1)) for b, e in zip(branches, ends, strict=True)]
    before = _split(policy, made)
    for changed, sequence in enumerate(made):
        other = sequence.token_ids_T.copy()
        other[-3:-1] = (other[-3:-1] + 7) % 90 + 5
        after = _split(
            policy, [replace(s, token_ids_T=other) if i == changed else s for i, s in enumerate(made)]
        )
        for place in range(len(made)):
            assert torch.equal(before[place], after[place]) == (place != changed)


@torch.no_grad()
def _split(policy: Policy, sequences: list[TokenSequence]) -> list[Tensor]:
    row = row_of(sequences)
    assert row.tree.forked
    logprobs_N, _ = policy.score(row, 1.0)
    return list(logprobs_N.split([s.num_sampled for s in sequences]))
