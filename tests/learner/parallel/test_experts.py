"""Experts that stay on their ranks compute what one rank computes that has them all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from learner.parallel.experts import ExpertParallel, experts_in
from learner.parallel.ranks import Ranks
from tests.families import build_family
from tests.learner.ranked import model_refused, plain, resumed, saved, stepped
from tests.learner.together import together

EXPERTS, CHOSEN, WIDTH = 8, 2, 16
SIZES: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 24,
    "moe_intermediate_size": 24,
    "num_experts": EXPERTS,
    "num_local_experts": EXPERTS,
    "num_hidden_layers": 1,
    "vocab_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "first_k_dense_replace": 0,
}
ON = {"expert_parallel": True}


def _layer(family: str) -> nn.Module:
    """A model of one layer, which computes its experts one by one."""
    config = AutoConfig.for_model(family, **SIZES)
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def _tokens(tokens: int, experts: int, rank: int) -> list[Tensor]:
    """Hidden states, weights of chosen experts and a gradient, drawn; experts among the first so many."""
    generator = torch.Generator().manual_seed(rank)
    drawn = [torch.randn(tokens, n, generator=generator).double() for n in (WIDTH, CHOSEN, WIDTH, experts)]
    return [*drawn[:3], drawn[3].argsort(1)[:, :CHOSEN]]


def _computed(module: Any, given: list[Tensor]) -> list[Tensor]:
    hidden_TD, weights_TK, grad_TD, experts_TK = given
    leaves = [hidden_TD.requires_grad_(), weights_TK.requires_grad_()]
    found_TD = module(hidden_TD, experts_TK, weights_TK)
    found_TD.backward(grad_TD)
    return [found_TD, *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def exchanged(ranks: Ranks, family: str, tokens: list[int], experts: int) -> tuple[list[Any], dict[str, Any]]:
    """Of this rank's tokens the result and its gradients; the gradients of all experts."""
    model = _layer(family)
    (module,) = experts_in(model).values()
    parallel = ExpertParallel(model, ranks, None)
    found = _computed(module, _tokens(tokens[ranks.rank], experts, ranks.rank))
    parallel.sum_over_copies()
    assert all(p.grad is not None and p.grad.to_local().shape[0] < EXPERTS for p in module.parameters())
    gradients = plain(p.grad for p in module.parameters())
    return plain(found), dict(zip(dict(module.named_parameters()), gradients, strict=True))


@pytest.mark.parametrize(
    ("family", "over", "tokens", "experts"),
    [
        ("qwen3_moe", None, [5, 9], EXPERTS),
        ("mixtral", None, [7, 1], CHOSEN),  # no token of any rank for the second one's
        ("gpt_oss", None, [6, 4], EXPERTS),  # experts with biases, and matrices the other way round
        ("deepseek_v3", 2, [3, 1, 4, 2], EXPERTS),
        ("qwen3_moe", 2, [3, 1, 4, 2], CHOSEN),
        ("qwen3_moe", None, [1, 6, 5, 1], EXPERTS),
    ],
)
def test_tokens_that_travel_are_computed_as_by_all_experts(
    family: str, over: int | None, tokens: list[int], experts: int
) -> None:
    answers = together(len(tokens), exchanged, family, tokens, experts, over=over)
    (module,) = experts_in(_layer(family)).values()
    for rank, (found, _) in enumerate(answers):
        wanted = _computed(module, _tokens(tokens[rank], experts, rank))
        for own, other in zip(found, plain(wanted), strict=True):
            np.testing.assert_allclose(own, other, rtol=0, atol=1e-12)
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None
        for _, gradients in answers:
            np.testing.assert_allclose(gradients[name], parameter.grad.numpy(), rtol=0, atol=1e-12)


# What learns -----------------------------------------------------------------------------------------------------

GAE: dict[str, Any] = {"kind": "gae", "gamma": 0.9, "lam": 0.8}
CRITIC: dict[str, Any] = {"advantage": GAE, "critic": {"optim": {"learning_rate": 0.03}}}
KL: dict[str, Any] = {"kl": {"coefficient": 0.3}, "skip_zero_advantage": False}
LORA = {"lora": {"rank": 2, "targets": ("q_proj", "v_proj")}}
CASES: list[Any] = [
    (CRITIC | KL, 2, {}),
    ({}, 1, {"gradient_checkpointing": True, "sum_gradients": "step"}),
    ({}, 1, {"gradient_checkpointing": "selective", "router_balance": 0.1}),
    ({}, 1, LORA),
]


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture of experts whose vocabulary no number of ranks divides."""
    folder = tmp_path_factory.mktemp("mixture")
    build_family("Qwen3-30B-A3B", False, folder, vocab_size=137)
    return folder


@pytest.fixture(scope="module")
def alone(mixture: Path) -> list[Any]:
    """What one rank makes of every case."""
    (found,) = together(1, stepped, mixture, CASES)
    return found


# Adam's step is as large for a gradient of rounding's size as for any other: of its 1e-2 a hundredth.
ROUNDING = 1e-4


def _near(one: list[Any], other: list[Any], atol: float) -> None:
    for left, right in zip(one, other, strict=True):
        np.testing.assert_allclose(left, right, rtol=0, atol=atol)


def _packed(metrics: dict[str, float]) -> dict[str, float]:
    """Metrics without the one that says how sequences were packed: ranks share no prefixes with each other."""
    return {name: value for name, value in metrics.items() if name != "tokens_processed"}


@pytest.mark.parametrize(
    ("size", "over", "context"),
    [
        (2, None, 1),
        (4, 2, 4),
        *(pytest.param(4, 2, context, marks=pytest.mark.rare) for context in (1, 2)),
    ],
)
def test_a_step_whose_tokens_travel_is_that_of_one_rank(
    size: int, over: int | None, context: int, mixture: Path, alone: list[Any]
) -> None:
    cases = [(recipe, steps, model | ON) for recipe, steps, model in CASES]
    for of_rank in together(size, stepped, mixture, cases, over=over, context=context):
        for found, expected in zip(of_rank, alone, strict=True):
            assert _packed(found["metrics"]) == pytest.approx(_packed(expected["metrics"]), abs=1e-6)
            _near(found["gradients"], expected["gradients"], 1e-6)
            for what in ("parameters", "critic"):
                _near(found[what], expected[what], ROUNDING)


@pytest.mark.parametrize(
    ("before", "after", "wrote", "reads"), [(4, 2, ON, ON), (2, 1, ON, {}), (2, 4, {}, ON)]
)
def test_a_checkpoint_is_continued_with_experts_elsewhere(
    before: int, after: int, wrote: dict[str, Any], reads: dict[str, Any], mixture: Path, tmp_path: Path
) -> None:
    made, *_ = together(before, saved, mixture, CRITIC, tmp_path, wrote, over=2)
    same, *_ = together(before, resumed, mixture, CRITIC, tmp_path, wrote, over=2)
    other, *_ = together(after, resumed, mixture, CRITIC, tmp_path, reads, over=None)
    for what in ("parameters", "moments"):
        _near(same[what], made[what], 0.0)
        _near(other[what], made[what], 0.0)
    assert _packed(other["metrics"]) == pytest.approx(_packed(same["metrics"]), abs=1e-4)
    assert other["manifest"] == same["manifest"] and all(spec.checksum for spec in same["manifest"])
    np.testing.assert_allclose(other["probe"], same["probe"], atol=1e-5)


def test_experts_that_cannot_be_divided_are_refused_by_all_ranks(tiny: Path, tmp_path: Path) -> None:
    build_family("Qwen3-30B-A3B", False, tmp_path, num_experts=5)
    for folder, message in (
        (tiny, "has no experts"),
        (tmp_path, "has 5 experts in model.layers.0.mlp.experts"),
    ):
        first, second = together(2, model_refused, folder, {"expert_parallel": True})
        assert first == second and message in first and "\n" not in first
