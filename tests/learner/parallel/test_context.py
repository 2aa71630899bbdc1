"""Ranks that compute a row together: what each holds, and that it is the row. What they learn is in test_ranks.py."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, Qwen3Config

from deploy.config.config_errors import ConfigError
from deploy.config.load import load_config
from learner.algorithm.algorithm import AlgorithmSettings
from learner.algorithm.schedule import OptimSettings
from learner.data.batch import TokenSequence, longest_row, pack, row_of
from learner.data.row_slice import RowSlice
from learner.model.attention import require_slices
from learner.model.footprint import saved_by
from learner.model.policy import Policy
from learner.model.saved_tensors import SavedTensors
from learner.model.tiny import build_tiny
from learner.parallel.context import ContextGroup
from learner.parallel.ranks import Ranks
from learner.settings import ModelSettings
from learner.training.optim import Optimizer
from learner.training.step import PolicyObjective, train_step
from tests.families import build_family
from tests.learner.ranked import built, groups_of, model_refused, own
from tests.learner.together import in_turn, together
from tests.smollm2 import FOLDER, needs_smollm2

TOKENS = 240


def _sequences(lengths: list[int], shared: int, vocabulary: int = 99) -> list[TokenSequence]:
    """Random sequences that begin alike; of each the tokens behind that are sampled."""
    rng = np.random.default_rng(0)
    prefix = rng.integers(5, vocabulary, shared)
    found = []
    for length in lengths:
        ids_T = np.concatenate([prefix, rng.integers(5, vocabulary, length - shared)]).astype(np.int32)
        sampled_T = np.arange(length) >= shared
        advantages_T = np.where(sampled_T, rng.normal(), 0).astype(np.float32)
        logprobs_T = np.where(sampled_T, -4.5, 0).astype(np.float32)
        versions_T = np.where(sampled_T, 0, -1).astype(np.int32)
        found.append(TokenSequence(ids_T, sampled_T, logprobs_T, advantages_T, versions_T))
    return found


@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_slices_are_equal_and_hold_every_pair_once(size: int) -> None:
    row = row_of(_sequences([13, 9, 11], shared=5))
    parts = [RowSlice.of(row, ContextGroup(rank, size)) for rank in range(size)]
    tokens = row.tree.tokens
    assert {len(part.own.input_ids_T) for part in parts} == {-(-tokens // size)}
    ids_T = torch.cat([part.own.input_ids_T for part in parts])[:tokens]
    assert torch.equal(ids_T, row.input_ids_T)
    nodes_M = torch.cat(
        [part.own.score_index_M + rank * len(part.own.input_ids_T) for rank, part in enumerate(parts)]
    )
    targets_M = torch.cat([part.own.targets_M for part in parts])
    for part in parts:
        assert part.counts == tuple(len(each.own.targets_M) for each in parts)
        assert part.order_M is not None
        assert torch.equal(nodes_M[part.order_M], row.score_index_M)
        assert torch.equal(targets_M[part.order_M], row.targets_M)
        assert part.own.tree.tokens == size * len(part.own.input_ids_T)


def held(ranks: Ranks, folder: Path, model: dict[str, Any]) -> int:
    """Bytes that autograd saves of TOKENS tokens of a row; what does not grow with the row is left out."""
    policy = Policy(ModelSettings(path=str(folder), **model), ranks)

    def saved(tokens: int) -> int:
        with (found := SavedTensors()):
            alive = policy.hidden(longest_row(tokens + 1, tokens))
        del alive
        return found.nbytes

    return saved(2 * TOKENS) - saved(TOKENS)


@pytest.mark.parametrize("model", [{}, {"dtype": "bfloat16"}, {"gradient_checkpointing": True}], ids=str)
def test_a_rank_holds_its_part_of_a_rows_activations(
    model: dict[str, Any], tmp_path: Path, tiny: Path
) -> None:
    shape = {"layers": 3, "width": 64, "heads": 4, "mlp": 96, "context": 1024}
    build_tiny(tmp_path, AutoTokenizer.from_pretrained(tiny), **shape)
    (alone,) = together(1, held, tmp_path, model)
    for size in (2, 4):
        told = saved_by(AutoConfig.from_pretrained(tmp_path), model.get("dtype", "float32"), size)
        assert told is not None
        for found in together(size, held, tmp_path, model, context=size):
            if "gradient_checkpointing" in model:  # inputs of layers alone
                assert found == pytest.approx(alone / size, rel=0.03)
            else:
                assert found == pytest.approx(told.row(TOKENS // size, 3, checkpointing=False), rel=0.01)
                # Key heads are repeated for four ranks, and attention's output is there as heads and as tokens.
                assert alone / size < found < 1.2 * alone / size


def gathered(ranks: Ranks, folder: Path, recipe: dict[str, Any], model: dict[str, Any]) -> set[int]:
    """The numbers of axes of what ranks gather of the slices of a row, in a step."""
    axes, all_gather = set[int](), dist.all_gather

    def watched(parts: list[Tensor], own_m: Tensor, **named: Any) -> Any:
        if own_m.is_floating_point():
            axes.add(own_m.ndim)
        return all_gather(parts, own_m, **named)

    learner = built(ranks, folder, recipe, **model)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(dist, "all_gather", watched)
        learner.step(own(ranks, groups_of(0)))
    return axes


def test_hidden_states_of_whole_rows_are_gathered_for_values_alone(tmp_path: Path, tiny: Path) -> None:
    build_family("Qwen3-30B-A3B", False, tmp_path)
    whole = {"skip_zero_advantage": False}
    cases: list[Any] = [
        (tiny, whole | {"distill": {"divergence": "reverse"}}, {}),
        (tmp_path, whole, {"router_balance": 0.1}),
        (tiny, whole | {"advantage": {"kind": "gae"}, "critic": {"kind": "shared"}}, {}),
    ]
    for found in together(2, in_turn, gathered, cases, context=2):
        assert found == [{1}, {1}, {1, 2}]


def test_heads_that_the_ranks_do_not_divide_are_refused(tmp_path: Path, tiny: Path) -> None:
    build_tiny(tmp_path, AutoTokenizer.from_pretrained(tiny), layers=1, width=32, heads=3, mlp=32)
    said = together(2, model_refused, tmp_path, {}, context=2)
    assert said[0] == said[1] and said[0].endswith(
        "has 3 attention heads, which learner.context_parallel_size=2 does not divide; use a divisor of both"
    )


@pytest.mark.parametrize(("ranks", "heads"), [(4, 3), (3, 4)])
def test_a_number_that_does_not_divide_ranks_and_heads_is_refused(ranks: int, heads: int) -> None:
    divided = r"learner\.ranks=4" if ranks == 4 else r"tiny\.heads=4"
    with pytest.raises(ConfigError, match=rf"context_parallel_size=3 does not divide {divided}"):
        load_config(
            "frozen_lake",
            [f"learner.ranks={ranks}", f"tiny.heads={heads}", "learner.context_parallel_size=3"],
        )


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_positions_that_depend_on_the_row_are_refused(kind: str) -> None:
    rope = {"rope_type": kind, "rope_theta": 1e6, "factor": 2.0, "original_max_position_embeddings": 64}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    config = Qwen3Config(num_attention_heads=4, head_dim=16, rope_parameters=rope)
    require_slices(config, 1)
    with pytest.raises(ValueError, match=f"has rotary positions of type '{kind}'"):
        require_slices(config, 2)


def taught(ranks: Ranks, loss: str) -> dict[str, float]:
    """Metrics of an optimizer step of the real model, on siblings of one long prefix."""
    policy = Policy(ModelSettings(path=str(FOLDER)), ranks)
    optimizer = Optimizer(policy.parameters(), OptimSettings(learning_rate=1e-5))
    sequences = [replace(each, weight=1 / 190) for each in _sequences([120, 100, 90, 80], 50, 40_000)]
    settings = AlgorithmSettings.model_validate({"loss": {"kind": loss}})
    batch = pack(sequences, 4096, policy.context)
    return train_step(policy, optimizer, batch, PolicyObjective(settings), temperature=1.0)


@needs_smollm2
@pytest.mark.rare
@pytest.mark.parametrize("loss", ["ppo", "gspo"])
def test_three_ranks_share_the_rows_of_the_real_model(loss: str) -> None:
    (alone,) = together(1, taught, loss, seconds=600)
    for found in together(3, taught, loss, seconds=600, context=3):
        assert found == pytest.approx(alone, rel=1e-4)
