"""What ranks exchange in a step, counted at torch's own collectives, is what is told."""

from __future__ import annotations

from dataclasses import replace
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
from learner.training.step_passes import passes_of
from tests.families import build_family
from tests.learner import ranked
from tests.learner.ranked import built, groups_of, own, rows
from tests.learner.together import together


def counted(
    ranks: Ranks, folder: Path, over: int, model: dict[str, Any], recipe: dict[str, Any]
) -> dict[str, Any]:
    """Bytes that a step brought to this rank, its rows, its tokens, and parameters by what they are."""
    copies, received, hidden = ranks.size // over, list[float](), list[float]()

    def watch(name: str, share: float, into: list[float]) -> None:
        collective = getattr(dist, name)

        def watched(*given: Any, **named: Any) -> Any:
            tensors = [each for each in (*given, *named.values()) if isinstance(each, Tensor)]
            if (
                name == "all_to_all_single"
            ):  # what is sent: all ranks together receive it, whoever has the experts
                tensors = tensors[1:]
            if into is received or (tensors[0].is_floating_point() and tensors[0].ndim == 2):
                into.append(share * max(each.nbytes for each in tensors))
            return collective(*given, **named)

        setattr(dist, name, watched)

    divided = over if "expert_parallel" in model else ranks.context.size
    watch("all_to_all_single", (divided - 1) / divided, received)
    watch("all_gather_single", (over - 1) / over, received)
    watch("reduce_scatter_single", (over - 1) / over, received)
    together = ranks.size if "lora" in model else copies
    watch("all_reduce", 2 * (together - 1) / together, received)
    watch("all_gather", ranks.context.size - 1, hidden)
    if "critic" in recipe:  # which looks at a token more of each sequence: one row has room for them
        ranked.LIMIT = 1000
    # Every row is computed.
    learner = built(ranks, folder, {"skip_zero_advantage": False} | recipe, **model)
    share, tokens = own(ranks, groups_of(3)), list[int]()
    embedding = learner.policy.model.get_input_embeddings()
    embedding.register_forward_hook(lambda module, given, found: tokens.append(given[0].numel()))
    learner._begin()
    received.clear()
    learner.step(share)
    adapter = sum(p.numel() for p in learner.policy.parameters()) if "lora" in model else 0
    parameters = list(learner.policy.model.parameters())
    return {
        "received": sum(received),
        "hidden": hidden,
        "passes": passes_of(learner.settings, max(ranks.gather(rows(share)))),
        "tokens": sum(tokens) / len(tokens),
        "parameters": sum(p.numel() for p in parameters) - adapter,
        "frozen": sum(p.numel() * p.dtype.itemsize for p in parameters if not p.requires_grad),
        "adapter": adapter,
        "experts": shape_of(learner.policy.model).experts,
    }


def _told(
    ranks: int, over: int, context: int, model: dict[str, Any], found: dict[str, Any], exchanged: float
) -> Traffic:
    """What is told of a step; exchanged: for a token of a slice."""
    size = {"float32": 4, "bfloat16": 2}[model["dtype"]]
    once, travel, a_row = model.get("sum_gradients") == "step", Travel(), found["tokens"]
    if "expert_parallel" in model:
        experts = found["experts"]
        travel = Travel(experts.parameters, round(experts.layers * experts.sent * a_row))
    return Traffic.of(
        found["parameters"],
        ranks,
        size,
        2,
        once,
        over,
        found["adapter"],
        round(exchanged * a_row),
        found["frozen"],
        travel,
        recomputed=bool(model.get("gradient_checkpointing")),
        hidden=round((context - 1) * a_row * WIDTH * size),
        teacher=found["parameters"] if found["passes"].taught else 0,
    )


WIDTH = 64
LORA = {"lora": {"rank": 8}}
NF4 = {"lora": {"rank": 8, "quantize_base": "nf4"}}
EXPERTS: dict[str, Any] = {"dtype": "bfloat16", "expert_parallel": True}
BALANCED: dict[str, Any] = {"dtype": "float32", "sum_gradients": "row", "router_balance": 0.01}
WIDE: dict[str, Any] = {"dtype": "float32", "sum_gradients": "row"}
OWN = {"advantage": {"kind": "gae"}, "critic": {"kind": "own"}}
SHARED = {"advantage": {"kind": "gae"}, "critic": {"kind": "shared"}}
SEVERAL = {"epochs": 2, "proximal": "learner"}


@pytest.mark.parametrize(
    ("ranks", "over", "context", "model", "recipe"),
    [
        (2, 2, 1, {"dtype": "float32", "sum_gradients": "row"}, {}),
        (2, 2, 1, {"dtype": "bfloat16", "sum_gradients": "row"}, {}),
        (2, 2, 1, {"dtype": "bfloat16", "sum_gradients": "step"}, {"kl": {"coefficient": 0.1}}),
        (4, 2, 1, {"dtype": "bfloat16", "sum_gradients": "row"}, {}),
        (4, 2, 1, {"dtype": "float32", "sum_gradients": "step"}, {}),
        (4, 2, 1, {"dtype": "bfloat16", **LORA}, {"kl": {"coefficient": 0.1}}),
        (4, 2, 1, {"dtype": "bfloat16", **NF4}, {}),
        (4, 4, 2, {"dtype": "bfloat16", "sum_gradients": "step"}, {}),
        (4, 2, 4, {"dtype": "float32", **LORA}, OWN),
        (2, 2, 1, EXPERTS, {}),
        (2, 2, 1, EXPERTS | {"gradient_checkpointing": True, "sum_gradients": "step"}, {}),
        (4, 2, 1, EXPERTS | {"gradient_checkpointing": "selective"}, {}),
        (4, 4, 1, EXPERTS | {"dtype": "float32", "sum_gradients": "step"}, {}),
        (4, 2, 2, EXPERTS | {"sum_gradients": "step"}, {}),
        (2, 2, 1, EXPERTS | {"lora": {"rank": 8, "targets": ("q_proj",)}}, {}),
        (2, 2, 1, BALANCED, {}),
        (4, 2, 2, EXPERTS | {"router_balance": 0.01}, {}),
        (2, 2, 2, WIDE, SHARED),
        (2, 2, 2, WIDE, OWN),
        (2, 2, 1, WIDE, SEVERAL),
        (2, 2, 1, WIDE, {"distill": {}}),
        (2, 2, 1, WIDE, {"distill": {"divergence": "reverse"}}),
    ],
)
def test_the_bytes_of_a_step_are_those_that_are_told(
    ranks: int,
    over: int,
    context: int,
    model: dict[str, Any],
    recipe: dict[str, Any],
    tiny: Path,
    tmp_path: Path,
) -> None:
    if {"expert_parallel", "router_balance"} & set(model):
        build_family("Qwen3-30B-A3B", False, tmp_path, num_experts=16)
    else:
        shape = {"layers": 3, "width": WIDTH, "heads": 4, "head_width": 16, "mlp": 96, "context": 128}
        build_tiny(tmp_path, AutoTokenizer.from_pretrained(tiny), **shape)
    exchanged = 0.0
    if context > 1:
        saved = saved_by(AutoConfig.from_pretrained(tmp_path), model["dtype"], context)
        assert saved is not None
        exchanged = saved.exchanged_per_token
    found = together(ranks, counted, tmp_path, over, model, recipe, over=over, context=context)
    told = [_told(ranks, over, context, model, each, exchanged) for each in found]
    steps = [
        of.step(replace(each["passes"], valued=0)) - of.version for of, each in zip(told, found, strict=True)
    ]
    # Rows that no two ranks divide are padded.
    assert sum(each["received"] for each in found) == pytest.approx(sum(steps), rel=0.02)
    if "expert_parallel" not in model:
        assert [each["received"] for each in found] == pytest.approx(steps, rel=0.02)
    for of, each in zip(told, found, strict=True):
        assert each["passes"].trained > 1 or "critic" in recipe
        # As many rows as are valued. Not every token is scored; values are looked at with a token more a sequence.
        assert len(each["hidden"]) == (each["passes"].valued if context > 1 else 0)
        assert all(0.3 * of.hidden < nbytes < 1.2 * of.hidden for nbytes in each["hidden"])
