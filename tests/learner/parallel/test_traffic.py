"""What ranks exchange in a step, counted at torch's own collectives, is what is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

from learner.model.footprint import saved_by
from learner.model.tiny import build_tiny
from learner.parallel.ranks import Ranks
from learner.parallel.traffic import Traffic
from tests.learner.ranked import built, groups_of, own, rows
from tests.learner.together import together


def counted(
    ranks: Ranks, folder: Path, dtype: str, sums: str, over: int, lora: dict[str, Any]
) -> tuple[float, int, int, int, int, int]:
    """Bytes that a step brought to this rank, its rows, its tokens, parameters of model and adapter; frozen bytes.

    lora: of the adapter; empty: all weights are trained.
    """
    copies, received = ranks.size // over, list[float]()

    def watch(name: str, share: float) -> None:
        collective = getattr(dist, name)

        def watched(*given: Any, **named: Any) -> Any:
            tensors = [each for each in (*given, *named.values()) if isinstance(each, Tensor)]
            received.append(share * max(each.nbytes for each in tensors))  # of the whole tensor
            return collective(*given, **named)

        setattr(dist, name, watched)

    watch("all_to_all_single", (ranks.context.size - 1) / ranks.context.size)
    watch("all_gather_single", (over - 1) / over)
    watch("reduce_scatter_single", (over - 1) / over)
    together = ranks.size if lora else copies
    watch("all_reduce", 2 * (together - 1) / together)
    recipe = {"skip_zero_advantage": False}  # every row is computed
    chosen = {"lora": lora} if lora else {}
    learner = built(ranks, folder, recipe, dtype=dtype, sum_gradients=sums, **chosen)
    share, tokens = own(ranks, groups_of(3)), list[int]()
    embedding = learner.policy.model.get_input_embeddings()
    embedding.register_forward_hook(lambda module, given, found: tokens.append(given[0].numel()))
    received.clear()
    learner.step(share)
    parameters = list(learner.policy.model.parameters())
    count = sum(parameter.numel() for parameter in parameters)
    adapter = sum(parameter.numel() for parameter in learner.policy.parameters()) if lora else 0
    frozen = sum(each.numel() * each.dtype.itemsize for each in parameters if not each.requires_grad)
    return sum(received), max(ranks.gather(rows(share))), sum(tokens), count - adapter, adapter, frozen


NF4 = {"rank": 8, "quantize_base": "nf4"}


@pytest.mark.parametrize(
    ("ranks", "over", "context", "dtype", "sums", "lora"),
    [
        (2, 2, 1, "float32", "row", {}),
        (2, 2, 1, "bfloat16", "row", {}),
        (2, 2, 1, "bfloat16", "step", {}),
        (4, 2, 1, "bfloat16", "row", {}),
        (4, 2, 1, "float32", "step", {}),
        (4, 2, 1, "bfloat16", "row", {"rank": 8}),
        (4, 2, 1, "bfloat16", "row", NF4),
        (4, 4, 2, "bfloat16", "step", {}),
        (4, 2, 4, "float32", "row", {"rank": 8}),
    ],
)
def test_the_bytes_of_a_step_are_those_that_are_told(
    ranks: int,
    over: int,
    context: int,
    dtype: str,
    sums: str,
    lora: dict[str, Any],
    tiny: Path,
    tmp_path: Path,
) -> None:
    shape = {"layers": 3, "width": 64, "heads": 4, "head_width": 16, "mlp": 96, "context": 128}
    build_tiny(tmp_path, AutoTokenizer.from_pretrained(tiny), **shape)
    size = {"float32": 4, "bfloat16": 2}[dtype]
    saved = saved_by(AutoConfig.from_pretrained(tmp_path), dtype, context)
    assert saved is not None
    args = tmp_path, dtype, sums, over, lora
    for received, count, tokens, *numbers in together(ranks, counted, *args, over=over, context=context):
        parameters, adapter, frozen = numbers
        slices = round(2 * saved.exchanged_per_token * tokens / count)
        told = Traffic.of(parameters, ranks, size, 2, sums == "step", over, adapter, slices, frozen)
        assert count > 1
        # Rows that no two ranks divide are padded.
        assert received == pytest.approx(told.step(count, updates=1) - told.version, rel=0.02)
