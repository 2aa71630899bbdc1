"""What ranks exchange in a step, counted at torch's own collectives, is what is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

from learner.model.footprint import saved_by, shape_of
from learner.model.tiny import build_tiny
from learner.parallel.ranks import Ranks
from learner.parallel.traffic import Traffic, Travel
from tests.families import build_family
from tests.learner.ranked import built, groups_of, own, rows
from tests.learner.together import together


def counted(ranks: Ranks, folder: Path, over: int, model: dict[str, Any]) -> dict[str, Any]:
    """Bytes that a step brought to this rank, its rows, its tokens, and parameters by what they are."""
    copies, received = ranks.size // over, list[float]()

    def watch(name: str, share: float) -> None:
        collective = getattr(dist, name)

        def watched(*given: Any, **named: Any) -> Any:
            tensors = [each for each in (*given, *named.values()) if isinstance(each, Tensor)]
            if (
                name == "all_to_all_single"
            ):  # what is sent: all ranks together receive it, whoever has the experts
                tensors = tensors[1:]
            received.append(share * max(each.nbytes for each in tensors))
            return collective(*given, **named)

        setattr(dist, name, watched)

    divided = over if "expert_parallel" in model else ranks.context.size
    watch("all_to_all_single", (divided - 1) / divided)
    watch("all_gather_single", (over - 1) / over)
    watch("reduce_scatter_single", (over - 1) / over)
    together = ranks.size if "lora" in model else copies
    watch("all_reduce", 2 * (together - 1) / together)
    recipe = {"skip_zero_advantage": False}  # every row is computed
    learner = built(ranks, folder, recipe, **model)
    share, tokens = own(ranks, groups_of(3)), list[int]()
    embedding = learner.policy.model.get_input_embeddings()
    embedding.register_forward_hook(lambda module, given, found: tokens.append(given[0].numel()))
    received.clear()
    learner.step(share)
    adapter = sum(p.numel() for p in learner.policy.parameters()) if "lora" in model else 0
    parameters = list(learner.policy.model.parameters())
    return {
        "received": sum(received),
        "rows": max(ranks.gather(rows(share))),
        "tokens": sum(tokens),
        "parameters": sum(p.numel() for p in parameters) - adapter,
        "frozen": sum(p.numel() * p.dtype.itemsize for p in parameters if not p.requires_grad),
        "adapter": adapter,
        "experts": shape_of(learner.policy.model).experts,
    }


def _told(ranks: int, over: int, model: dict[str, Any], found: dict[str, Any], exchanged: float) -> float:
    """Bytes that are told of a step, without the version that it makes; exchanged: for a token of a slice."""
    size = {"float32": 4, "bfloat16": 2}[model["dtype"]]
    once, travel, a_row = model.get("sum_gradients") == "step", Travel(), found["tokens"] / found["rows"]
    if "expert_parallel" in model:
        experts = found["experts"]
        numbers = round(experts.layers * experts.sent * a_row)
        travel = Travel(experts.parameters, numbers, bool(model.get("gradient_checkpointing")))
    slices = round(2 * exchanged * a_row)
    told = Traffic.of(
        found["parameters"], ranks, size, 2, once, over, found["adapter"], slices, found["frozen"], travel
    )
    return told.step(found["rows"], updates=1) - told.version


LORA = {"lora": {"rank": 8}}
NF4 = {"lora": {"rank": 8, "quantize_base": "nf4"}}
EXPERTS: dict[str, Any] = {"dtype": "bfloat16", "expert_parallel": True}


@pytest.mark.parametrize(
    ("ranks", "over", "context", "model"),
    [
        (2, 2, 1, {"dtype": "float32", "sum_gradients": "row"}),
        (2, 2, 1, {"dtype": "bfloat16", "sum_gradients": "row"}),
        (2, 2, 1, {"dtype": "bfloat16", "sum_gradients": "step"}),
        (4, 2, 1, {"dtype": "bfloat16", "sum_gradients": "row"}),
        (4, 2, 1, {"dtype": "float32", "sum_gradients": "step"}),
        (4, 2, 1, {"dtype": "bfloat16", **LORA}),
        (4, 2, 1, {"dtype": "bfloat16", **NF4}),
        (4, 4, 2, {"dtype": "bfloat16", "sum_gradients": "step"}),
        (4, 2, 4, {"dtype": "float32", **LORA}),
        (2, 2, 1, EXPERTS),
        (2, 2, 1, EXPERTS | {"gradient_checkpointing": True, "sum_gradients": "step"}),
        (4, 2, 1, EXPERTS | {"gradient_checkpointing": "selective"}),
        (4, 4, 1, EXPERTS | {"dtype": "float32", "sum_gradients": "step"}),
        (4, 2, 2, EXPERTS | {"sum_gradients": "step"}),
        (2, 2, 1, EXPERTS | {"lora": {"rank": 8, "targets": ("q_proj",)}}),
    ],
)
def test_the_bytes_of_a_step_are_those_that_are_told(
    ranks: int, over: int, context: int, model: dict[str, Any], tiny: Path, tmp_path: Path
) -> None:
    if "expert_parallel" in model:
        build_family("Qwen3-30B-A3B", False, tmp_path, num_experts=16)
    else:
        shape = {"layers": 3, "width": 64, "heads": 4, "head_width": 16, "mlp": 96, "context": 128}
        build_tiny(tmp_path, AutoTokenizer.from_pretrained(tiny), **shape)
    exchanged = 0.0
    if context > 1:
        saved = saved_by(AutoConfig.from_pretrained(tmp_path), model["dtype"], context)
        assert saved is not None
        exchanged = saved.exchanged_per_token
    found = together(ranks, counted, tmp_path, over, model, over=over, context=context)
    assert found[0]["rows"] > 1
    # Rows that no two ranks divide are padded.
    told = [_told(ranks, over, model, each, exchanged) for each in found]
    assert sum(each["received"] for each in found) == pytest.approx(sum(told), rel=0.02)
    if "expert_parallel" not in model:
        assert [each["received"] for each in found] == pytest.approx(told, rel=0.02)
