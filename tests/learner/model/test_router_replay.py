"""Every token is computed with the experts that were stored with it, whatever rows, ranks and layers it lies in."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from learner.data.batch import Batch, MicroBatch, TokenSequence, pack, row_of
from learner.model.loading import ModelError
from learner.model.policy import Policy
from learner.model.router_replay import routing_bytes
from learner.parallel.ranks import ALONE, Ranks
from learner.settings import ModelSettings
from learner.training.step import Stats, accumulate
from rollout.wire.model_folder import token_count
from tests.families import build_family
from tests.learner.model.test_router_balance import TEXTS
from tests.learner.ranked import plain
from tests.learner.together import together
from tests.qwen3 import QWEN3_8B, QWEN3_30B_A3B

LAYERS, EXPERTS, CHOSEN = 3, 8, 2
FIELDS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {},
    # The second layer has no experts: stored numbers are of a layer's place among all.
    "dense_between": {"mlp_only_layers": [1]},
    "mixtral": {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": CHOSEN,
    },
    # Scores are sigmoids, experts are chosen from groups, and by a bias that weighs nothing.
    "deepseek_v3": {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "n_routed_experts": EXPERTS,
        "num_experts_per_tok": CHOSEN,
        "first_k_dense_replace": 1,
        "n_group": 2,
        "topk_group": 1,
        "q_lora_rank": None,
        "kv_lora_rank": 32,
        "qk_rope_head_dim": 16,
        "head_dim": 16,
        "qk_nope_head_dim": 16,
        "v_head_dim": 32,
        "num_key_value_heads": 4,
    },
}


def _build(family: str, folder: Path) -> None:
    build_family("Qwen3-30B-A3B", False, folder, num_hidden_layers=LAYERS, **FIELDS[family])


def _drawn() -> list[np.ndarray]:
    """Experts [I, L, K] of the inputs of every text, drawn; of the third as of the first where both have the same."""
    random = np.random.default_rng(0)
    found = []
    for ids in TEXTS:
        scores = random.random((len(ids) - 1, LAYERS, EXPERTS))
        found.append(scores.argsort(-1)[..., :CHOSEN].astype(np.uint8))
    found[2][:14] = found[0][:14]
    return found


def _sequence(ids: list[int], experts: np.ndarray | None) -> TokenSequence:
    ids_T = np.asarray(ids, np.int32)
    return TokenSequence(
        token_ids_T=ids_T,
        sampled_T=np.arange(len(ids)) >= 1,
        behavior_logprobs_T=np.zeros(len(ids), np.float32),
        advantages_T=np.ones(len(ids), np.float32),
        versions_T=np.zeros(len(ids), np.int32),
        routed_IB=None if experts is None else experts.reshape(len(experts), -1),
    )


def replayed(
    ranks: Ranks, folder: Path, tokens_per_row: int, share: bool, model: dict[str, Any]
) -> tuple[dict[int, np.ndarray], dict[str, Any]]:
    """Logprobs of each text of this rank, and gradients of the mean of all; texts are dealt to ranks in turn."""
    policy = Policy(ModelSettings(path=str(folder), router_replay=True, **model), ranks)
    experts = _drawn()
    numbers = range(len(TEXTS))[ranks.share.rank :: ranks.share.ranks]
    own = [_sequence(TEXTS[number], experts[number]) for number in numbers]
    alone = [row_of([sequence]) for sequence in own]
    most = ranks.most(len(own))
    scored = [policy.score(alone[min(place, len(own) - 1)], 1.0)[0].detach().numpy() for place in range(most)]
    batch: Batch = pack(own, tokens_per_row, policy.context, share=share)

    def loss_of(micro: MicroBatch) -> tuple[Tensor, Stats]:
        return -policy.score(micro, 1.0)[0], {}

    accumulate(policy, batch, loss_of)
    gradients = {name: p.grad for name, p in policy.model.named_parameters() if p.grad is not None}
    return dict(zip(numbers, scored, strict=False)), dict(
        zip(gradients, plain(gradients.values()), strict=True)
    )


def _expected(folder: Path) -> tuple[list[np.ndarray], dict[str, Any]]:
    """The same by transformers, each text alone: experts are given the stored choice, and its weights by formula."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    tokens = token_count(str(folder))  # no other ids are sampled
    stored: dict[int, Tensor] = {}

    def given(layer: int, gate: Any, hidden_TD: Tensor) -> tuple[Tensor, ...]:
        logits_TK = torch.nn.functional.linear(hidden_TD, gate.weight).gather(1, stored[layer])
        if model.config.model_type == "deepseek_v3":
            weights_TK = logits_TK.sigmoid()
            scale = model.config.routed_scaling_factor / (weights_TK.sum(-1, keepdim=True) + 1e-20)
            return hidden_TD, stored[layer], weights_TK * scale
        # Probabilities of the chosen, normalized: a softmax over their logits alone.
        return hidden_TD, stored[layer], logits_TK.softmax(-1)

    for name, _ in model.named_modules():
        if match := re.fullmatch(r"(model\.layers\.(\d+)\.mlp)\.experts", name):
            block = model.get_submodule(match[1])
            told = partial(given, int(match[2]), block.gate)
            block.experts.register_forward_pre_hook(lambda _, args, told=told: told(args[0]))
    scored, total = [], torch.zeros(())
    for ids, experts in zip(TEXTS, _drawn(), strict=True):
        stored.update({layer: torch.from_numpy(experts[:, layer]).long() for layer in range(LAYERS)})
        logprobs_TV = model(torch.tensor([ids[:-1]])).logits[0, :, :tokens].log_softmax(-1)
        logprobs_N = logprobs_TV.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        scored.append(logprobs_N.detach().numpy())
        total = total - logprobs_N.sum()
    total.backward()
    return scored, {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("family", "size", "context", "tokens_per_row", "share", "model"),
    [
        ("qwen3_moe", 1, 1, 1000, True, {}),
        ("qwen3_moe", 1, 1, 20, False, {"gradient_checkpointing": True}),
        ("qwen3_moe", 1, 1, 20, True, {"gradient_checkpointing": "selective"}),
        ("dense_between", 1, 1, 20, True, {}),
        ("mixtral", 1, 1, 1000, True, {}),
        ("deepseek_v3", 1, 1, 1000, True, {}),
        ("qwen3_moe", 2, 1, 20, True, {"sum_gradients": "step", "gradient_checkpointing": True}),
        ("qwen3_moe", 2, 1, 1000, False, {}),
        ("qwen3_moe", 4, 4, 20, True, {"gradient_checkpointing": "selective"}),
        ("deepseek_v3", 2, 2, 1000, True, {}),
        ("qwen3_moe", 2, 1, 20, True, {"expert_parallel": True, "gradient_checkpointing": "selective"}),
        ("deepseek_v3", 4, 2, 1000, True, {"expert_parallel": True}),
    ],
)
def test_stored_experts_compute_what_transformers_computes_with_them(
    family: str,
    size: int,
    context: int,
    tokens_per_row: int,
    share: bool,
    model: dict[str, Any],
    tmp_path: Path,
) -> None:
    _build(family, tmp_path)
    logprobs, expected = _expected(tmp_path)
    assert any(name.endswith("gate.weight") and np.abs(g).max() > 0 for name, g in expected.items())
    answers = together(size, replayed, tmp_path, tokens_per_row, share, model, context=context)
    for scored, gradients in answers:
        for number, found in scored.items():
            np.testing.assert_allclose(found, logprobs[number], atol=2e-5)
        for name, wanted in expected.items():
            np.testing.assert_allclose(gradients[name], wanted, rtol=2e-4, atol=2e-5, err_msg=name)


def test_tokens_are_shared_up_to_the_first_difference_of_their_experts() -> None:
    ids = list(range(3, 15))
    experts = np.zeros((11, LAYERS, CHOSEN), np.uint8)
    other = experts.copy()
    other[6, 2, 1] = 1
    sequences = [_sequence(ids, each) for each in (experts, None, experts, other)]
    row = row_of(sequences)
    assert row.tree.tokens == 11 + 5 + 11
    for sequence, path_T in zip(sequences, row.tree.paths_B, strict=True):
        assert row.routed_TB is not None and row.routed_T is not None
        assert (row.input_ids_T[path_T].numpy() == ids[:-1]).all()
        assert row.routed_T[path_T].unique().tolist() == [sequence.routed_IB is not None]
        if sequence.routed_IB is not None:
            np.testing.assert_array_equal(row.routed_TB[path_T], sequence.routed_IB)


def test_tokens_without_stored_experts_are_routed_by_the_learner(tmp_path: Path) -> None:
    _build("qwen3_moe", tmp_path)
    policy = Policy(ModelSettings(path=str(tmp_path), router_replay=True), ALONE)
    plainly = policy.twin()
    experts = _drawn()[0]
    known = _sequence(TEXTS[0], experts[:4])  # of a turn; the next one was played without
    unknown = _sequence(TEXTS[1], None)
    with torch.no_grad():
        both = policy.score(row_of([known, unknown]), 1.0)[0].numpy()
        without = plainly.score(row_of([replace(known, routed_IB=None), unknown]), 1.0)[0].numpy()
    np.testing.assert_allclose(both[14:], without[14:], atol=1e-5)
    assert np.abs(both[:4] - without[:4]).min() > 1e-4
    # What is no episode's, such as the probe of a sync, is never routed by the row before it.
    np.testing.assert_allclose(policy.score_ids(TEXTS[3]), plainly.score_ids(TEXTS[3]), atol=1e-6)


def test_the_reference_of_an_adapter_routes_by_itself(tmp_path: Path) -> None:
    _build("qwen3_moe", tmp_path)
    policy = Policy(ModelSettings(path=str(tmp_path), router_replay=True), ALONE)
    row = row_of([_sequence(TEXTS[0], _drawn()[0])])
    assert policy.replay is not None
    with torch.no_grad():
        replaying = policy.score(row, 1.0)[0]
        with policy.replay.off():
            alone = policy.score(row, 1.0)[0]
        torch.testing.assert_close(alone, policy.twin().score(row, 1.0)[0])
        assert (replaying - alone).abs().max() > 1e-3
        torch.testing.assert_close(policy.score(row, 1.0)[0], replaying)


def test_what_a_token_costs_is_known_before_a_run() -> None:
    assert routing_bytes(AutoConfig.for_model(**QWEN3_30B_A3B.config())) == 48 * 8
    assert routing_bytes(AutoConfig.for_model("qwen3_moe", num_experts=512, num_hidden_layers=2)) == 2 * 8 * 2
    assert routing_bytes(AutoConfig.for_model(**QWEN3_8B.config())) == 0


def test_what_cannot_be_replayed_is_refused_in_one_line(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no routers of experts; set learner\.model\.router_replay=false$"):
        Policy(ModelSettings(path=str(tiny), router_replay=True), ALONE)
    _build("qwen3_moe", tmp_path)
    policy = Policy(ModelSettings(path=str(tmp_path), router_replay=True), ALONE)
    of_another = _sequence(TEXTS[0], _drawn()[0][:, :2])
    with pytest.raises(ModelError, match="4 bytes a token is not of 3 layers and 2 experts a token"):
        policy.score(row_of([of_another]), 1.0)
