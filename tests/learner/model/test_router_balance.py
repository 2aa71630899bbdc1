"""The load-balancing loss of routers is transformers', whatever rows and ranks the tokens lie in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func as of_mixtral
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func as of_qwen3

from learner.data.batch import Batch, MicroBatch, TokenSequence, pack
from learner.model.loading import ModelError
from learner.model.policy import Policy
from learner.parallel.ranks import ALONE, Ranks
from learner.settings import ModelSettings
from learner.training.step import Stats, accumulate
from tests.families import build_family
from tests.learner.ranked import plain
from tests.learner.together import together

COEFFICIENT = 0.7
MIXTRAL: dict[str, Any] = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}
# What siblings begin alike with is computed once, and counts for each.
TEXTS = [
    [*range(3, 15), 7, 9, 4],
    [*range(3, 15), 5, 5],
    [*range(3, 15), 7, 9, 8, 6],
    [9, 8, 7, 6, 5],
    [4, 4],
]


def _sequence(ids: list[int]) -> TokenSequence:
    ids_T = np.asarray(ids, np.int32)
    return TokenSequence(
        token_ids_T=ids_T,
        sampled_T=np.arange(len(ids)) >= len(ids) - 1,
        behavior_logprobs_T=np.zeros(len(ids), np.float32),
        advantages_T=np.ones(len(ids), np.float32),
        versions_T=np.zeros(len(ids), np.int32),
    )


def _build(family: str, folder: Path) -> None:
    fields = MIXTRAL if family == "mixtral" else {}
    build_family("Qwen3-30B-A3B", False, folder, num_hidden_layers=2, **fields)


def balanced(ranks: Ranks, folder: Path, tokens_per_row: int, model: dict[str, Any]) -> tuple[Any, ...]:
    """Loss, balance and gradients of the texts, dealt to the ranks in turn, with no other loss."""
    policy = Policy(ModelSettings(path=str(folder), router_balance=COEFFICIENT, **model), ranks)
    own = [_sequence(ids) for ids in TEXTS[ranks.share.rank :: ranks.share.ranks]]
    batch: Batch = pack(own, tokens_per_row, policy.context)

    def loss_of(micro: MicroBatch) -> tuple[Tensor, Stats]:
        return 0.0 * policy.score(micro, 1.0)[0], {}

    loss, means = accumulate(policy, batch, loss_of, policy.balance)
    gradients = {name: p.grad for name, p in policy.model.named_parameters() if p.grad is not None}
    return loss, means["router_balance"], dict(zip(gradients, plain(gradients.values()), strict=True))


def _expected(folder: Path) -> tuple[float, dict[str, Any]]:
    """transformers' loss over the texts, each computed alone, and its gradients."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    told = [model(torch.tensor([ids[:-1]]), output_router_logits=True).router_logits for ids in TEXTS]
    whole = tuple(torch.cat(layer) for layer in zip(*told, strict=True))
    function = of_mixtral if model.config.model_type == "mixtral" else of_qwen3
    found = function(whole, whole[0].shape[1], model.config.num_experts_per_tok)
    (COEFFICIENT * found).backward()
    gradients = {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}
    return found.item(), gradients


@pytest.mark.parametrize(
    ("family", "size", "context", "tokens_per_row", "model"),
    [
        ("qwen3_moe", 1, 1, 1000, {}),
        ("qwen3_moe", 1, 1, 20, {"gradient_checkpointing": True}),
        ("mixtral", 1, 1, 20, {}),
        ("qwen3_moe", 2, 1, 20, {"sum_gradients": "step"}),
        ("mixtral", 2, 1, 1000, {}),
        ("qwen3_moe", 4, 2, 20, {"gradient_checkpointing": True}),
        ("mixtral", 4, 2, 20, {"expert_parallel": True, "gradient_checkpointing": True}),
    ],
)
def test_the_loss_is_that_of_all_tokens_of_a_step(
    family: str, size: int, context: int, tokens_per_row: int, model: dict[str, Any], tmp_path: Path
) -> None:
    _build(family, tmp_path)
    value, expected = _expected(tmp_path)
    assert any("gate" in name for name in expected)
    found = together(size, balanced, tmp_path, tokens_per_row, model, context=context)
    for loss, balance, gradients in found:
        assert balance == pytest.approx(value, rel=1e-5)
        assert loss == pytest.approx(COEFFICIENT * value, rel=1e-5)
        for name, wanted in expected.items():
            np.testing.assert_allclose(gradients[name], wanted, rtol=1e-4, atol=1e-7, err_msg=name)
        rest = [np.abs(each).max() for name, each in gradients.items() if name not in expected]
        assert max(rest, default=0.0) == 0.0


def test_a_model_without_experts_is_refused(tiny: Path) -> None:
    with pytest.raises(ModelError, match=r"set learner\.model\.router_balance=0"):
        Policy(ModelSettings(path=str(tiny), router_balance=0.1), ALONE)
