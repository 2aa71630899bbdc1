"""Compiled layers compute what the same layers do; rows of new lengths compile nothing."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from transformers import Qwen3MoeConfig

from learner.data.batch import longest_row
from learner.model import compiled
from learner.model.compiled import compile_layers
from learner.model.loading import ModelError
from learner.model.mixtures import require_mixture_of
from learner.model.policy import Policy
from learner.settings import ModelSettings
from tests.families import PUBLISHED, build_family
from tests.learner.ranked import stepped
from tests.learner.together import together
from tests.smollm2 import FOLDER, needs_smollm2

HALF = {"dtype": "bfloat16"}
GRPO: dict[str, Any] = {"advantage": {"kind": "grpo"}}


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[GraphModule]:
    """What was compiled, by a compiler that leaves every operator as it is."""
    found: list[GraphModule] = []

    def kept(graph: GraphModule, inputs: Any) -> Any:
        found.append(graph)
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(compiled, "BACKEND", kept)
    return found


def _read(policy: Policy, tokens: int) -> list[Tensor]:
    """What a row gives, and its gradients."""
    for parameter in policy.parameters():
        parameter.grad = None
    logprobs_N, entropy_N, hidden_ND = policy.read(longest_row(tokens, 96), 0.7)
    (logprobs_N.sum() + 0.1 * entropy_N.sum()).backward()
    gradients = [p.grad for p in policy.parameters() if p.grad is not None]
    return [logprobs_N.detach(), entropy_N.detach(), hidden_ND.detach(), *gradients]


def _policy(folder: Path, **model: Any) -> Policy:
    return Policy(ModelSettings.model_validate({"path": str(folder), **model}))


@pytest.mark.parametrize(
    ("model", "recomputed"),
    [
        ({}, False),
        (HALF, True),
        (HALF | {"lora": {"rank": 2}}, False),
        (HALF | {"float8": True}, True),
    ],
)
def test_layers_compute_the_same_and_rows_of_new_lengths_compile_nothing(
    tiny: Path, model: dict[str, Any], recomputed: bool, graphs: list[GraphModule]
) -> None:
    model = model | {"gradient_checkpointing": recomputed}
    plain, policy = _policy(tiny, **model), _policy(tiny, **model, compile=True)
    graphs.clear()
    for tokens in (40, 51):  # for the one length, and for any
        _read(policy, tokens)
    before = len(graphs)
    assert before > 0
    for tokens in (40, 51, 64, 96):
        for found, expected in zip(_read(policy, tokens), _read(plain, tokens), strict=True):
            assert torch.equal(found, expected)
    assert len(graphs) == before
    called = {str(n.target) for graph in graphs for n in graph.graph.nodes if n.op.startswith("call")}
    assert called and not any("attention" in target for target in called)  # it stays outside


def test_layers_alike_are_compiled_once(tiny: Path, graphs: list[GraphModule]) -> None:
    policy = _policy(tiny, compile=True)
    graphs.clear()
    with torch.no_grad():
        policy.score(longest_row(40, 96), 1.0)
    # The first normalization, attention's inputs, its output's product, all that is behind.
    assert len(graphs) == 4


@pytest.mark.rare
@pytest.mark.parametrize("family", sorted(PUBLISHED))
def test_published_families_compute_the_same(family: str, tmp_path: Path, graphs: list[GraphModule]) -> None:
    build_family(family, True, tmp_path)
    if "num_experts" in PUBLISHED[family]:
        with pytest.raises(ModelError, match="is a mixture of experts"):
            _policy(tmp_path, compile=True)
        return
    plain, policy = _policy(tmp_path), _policy(tmp_path, compile=True)
    for tokens in (30, 41, 60):
        for found, expected in zip(_read(policy, tokens), _read(plain, tokens), strict=True):
            assert torch.equal(found, expected)
    assert graphs


def compiled_steps(ranks: Any, tiny: Path, cases: list[Any]) -> Any:
    """`stepped` with layers that another process compiles into the same operators."""
    compiled.BACKEND = "eager"
    return stepped(ranks, tiny, cases)


def test_two_ranks_learn_the_same_from_compiled_layers(tiny: Path) -> None:
    expected, *_ = together(2, stepped, tiny, [(GRPO, 2, {})])
    for found in together(2, compiled_steps, tiny, [(GRPO, 2, {"compile": True})]):
        for one, other in zip(found[0]["parameters"], expected[0]["parameters"], strict=True):
            assert (one == other).all()


@needs_smollm2
@pytest.mark.rare
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no compiler")
def test_a_real_model_in_generated_code_differs_by_rounding() -> None:
    torch._dynamo.reset()
    plain, policy = _policy(FOLDER), _policy(FOLDER, compile=True)
    for tokens in (40, 70):
        (logprobs_N, _, _, *gradients), (expected_N, _, _, *others) = (
            _read(each, tokens) for each in (policy, plain)
        )
        torch.testing.assert_close(logprobs_N, expected_N, rtol=0, atol=1e-3)
        one, other = (torch.cat([each.flatten() for each in all_]) for all_ in (gradients, others))
        assert torch.cosine_similarity(one.double(), other.double(), dim=0) > 0.99999


def test_what_cannot_be_compiled_is_refused_in_one_line(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="has no layers that can be compiled"):
        compile_layers(nn.Linear(2, 2), torch.device("cpu"))
    with pytest.raises(ValueError, match="is a mixture of experts, which is not compiled"):
        require_mixture_of(Qwen3MoeConfig(num_hidden_layers=1), ModelSettings(path="x", compile=True), 1)
    with pytest.raises(ModelError, match=r"leave out learner\.model\.lora\.quantize_base"):
        _policy(tiny, lora={"quantize_base": "nf4"}, compile=True)
    with pytest.raises(ModelError, match="set it to true or false"):
        _policy(tiny, gradient_checkpointing="selective", compile=True)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ModelError, match=r"has no C\+\+ compiler 'no-such-compiler'") as error:
        _policy(tiny, compile=True)
    assert "\n" not in str(error.value)
