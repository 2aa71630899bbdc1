"""In bfloat16 the numbers of a step do not depend on how many ranks make it: every value has the same type."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from learner.data.batch import Batch, MicroBatch, longest_row
from learner.model.attention import hidden_states, register
from learner.model.policy import Policy
from learner.parallel.ranks import Ranks
from learner.settings import ModelSettings
from learner.training.step import Stats, accumulate
from tests.families import build_family
from tests.learner.ranked import plain
from tests.learner.together import together

ROWS = 4
ADAPTER = {"lora": {"rank": 2}, "gradient_checkpointing": "selective"}
UNIT = 2.0**-24  # relative error of one float32 sum
HALF = 2.0**-8  # of one number that is rounded to bfloat16


def _row(number: int) -> MicroBatch:
    return longest_row(9 + number, 20 + number)


def seen(ranks: Ranks, folder: Path, model: dict[str, Any]) -> dict[str, Any]:
    """Loss and gradients of the rows, dealt to the ranks in turn, and the types of what modules return."""
    policy = Policy(ModelSettings(path=str(folder), dtype="bfloat16", **model), ranks)
    for parameter in policy.adapter.parameters() if policy.adapter else ():
        generator = torch.Generator().manual_seed(parameter.numel())
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    types: set[str] = set()

    def note(module: nn.Module, given: Any, found: Any) -> None:
        first = found if isinstance(found, Tensor) else found[0]
        types.add(f"{type(module).__name__.removeprefix('FSDP')}: {first.dtype}")

    for module in policy.model.modules():
        module.register_forward_hook(note)

    def loss_of(micro: MicroBatch) -> tuple[Tensor, Stats]:
        logprobs_N, entropy_N = policy.score(micro, 0.8)
        return entropy_N * 0.1 - logprobs_N, {}

    def gradients(rows: list[MicroBatch]) -> tuple[float, list[Any]]:
        for parameter in policy.parameters():
            parameter.grad = None
        loss, _ = accumulate(policy, Batch(tuple(rows), 1, 1, 0), loss_of)
        return loss, plain(p.grad for p in policy.parameters() if p.grad is not None)

    rows = [_row(number) for number in range(ROWS)]
    loss, summed = gradients(rows[ranks.rank :: ranks.size])
    alone = [gradients([row])[1] for row in rows] if ranks.size == 1 else []
    sizes = [np.sum(np.abs(each), axis=0) for each in zip(*alone, strict=True)]
    return {"loss": loss, "gradients": summed, "sizes": sizes, "types": types}


@pytest.mark.parametrize(
    "model", [{}, {"gradient_checkpointing": True}, {"sum_gradients": "step"}, ADAPTER], ids=str
)
def test_bfloat16_ranks_differ_by_the_order_of_float32_sums_alone(tiny: Path, model: dict[str, Any]) -> None:
    (one,) = together(1, seen, tiny, model)
    assert len(one["gradients"]) == len(one["sizes"]) > 10
    for size in (2, 4):
        for found in together(size, seen, tiny, model):
            assert found["types"] == one["types"]
            # A row gives the same bits anywhere. ROWS numbers are added in one order and in another, each of which is
            # within ROWS - 1 roundings of the exact sum.
            assert found["loss"] == pytest.approx(one["loss"], rel=2 * (ROWS - 1) * UNIT)
            for own, other, size_of in zip(found["gradients"], one["gradients"], one["sizes"], strict=True):
                assert own.dtype == np.float32
                assert np.all(np.abs(own - other) <= 2 * (ROWS - 1) * UNIT * size_of)


@pytest.mark.parametrize("model", [{}, {"gradient_checkpointing": True}], ids=str)
def test_gradients_of_experts_that_stay_differ_by_one_rounding_of_each(
    tmp_path: Path, model: dict[str, Any]
) -> None:
    build_family("Qwen3-30B-A3B", False, tmp_path)
    (one,) = together(1, seen, tmp_path, model)
    for size in (2, 4):
        for found in together(size, seen, tmp_path, model | {"expert_parallel": True}):
            assert found["types"] == one["types"]
            assert found["loss"] == pytest.approx(one["loss"], rel=2 * (ROWS - 1) * UNIT)
            for own, other, size_of in zip(found["gradients"], one["gradients"], one["sizes"], strict=True):
                # Of experts the rows of all ranks are added first, and rounded to bfloat16 then.
                bound = 2 * HALF if own.ndim == 3 else 2 * (ROWS - 1) * UNIT
                assert np.all(np.abs(own - other) <= bound * size_of)


def test_one_rank_in_bfloat16_computes_what_transformers_does_in_it(tiny: Path) -> None:
    policy = Policy(ModelSettings(path=str(tiny), dtype="bfloat16"))
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.bfloat16, attn_implementation=register())
    row = _row(0)
    with torch.no_grad():
        want_TD = hidden_states(model, row.input_ids_T, row.tree, position_ids=row.position_ids_T[None])
        found_MD = policy._whole(lambda: policy._scored(row))
    assert torch.equal(found_MD, want_TD.index_select(0, row.score_index_M))
