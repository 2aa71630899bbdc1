"""What ranks exchange in a step, counted at torch's own collectives, is what is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch import Tensor
from transformers import AutoTokenizer

from learner.model.tiny import build_tiny
from learner.parallel.ranks import Ranks
from learner.parallel.traffic import Traffic
from tests.learner.ranked import built, groups_of, own, rows
from tests.learner.together import together


def counted(ranks: Ranks, folder: Path, dtype: str, sums: str, over: int) -> tuple[float, int, int]:
    """Bytes that a step brought to this rank, its rows, and the model's parameters."""
    copies, received = ranks.size // over, list[float]()

    def watch(name: str, share: float) -> None:
        collective = getattr(dist, name)

        def watched(*given: Any, **named: Any) -> Any:
            tensors = [each for each in (*given, *named.values()) if isinstance(each, Tensor)]
            received.append(share * max(each.nbytes for each in tensors))  # of the whole tensor
            return collective(*given, **named)

        setattr(dist, name, watched)

    watch("all_gather_single", (over - 1) / over)
    watch("reduce_scatter_single", (over - 1) / over)
    watch("all_reduce", 2 * (copies - 1) / copies)
    learner = built(ranks, folder, {}, dtype=dtype, sum_gradients=sums)
    share = own(ranks, groups_of(3))
    received.clear()
    learner.step(share)
    parameters = sum(parameter.numel() for parameter in learner.policy.parameters())
    return sum(received), max(ranks.gather(rows(share))), parameters


@pytest.mark.parametrize(
    ("ranks", "over", "dtype", "sums"),
    [
        (2, 2, "float32", "row"),
        (2, 2, "bfloat16", "row"),
        (2, 2, "bfloat16", "step"),
        (4, 2, "bfloat16", "row"),
        (4, 2, "float32", "step"),
    ],
)
def test_the_bytes_of_a_step_are_those_that_are_told(
    ranks: int, over: int, dtype: str, sums: str, tiny: Path, tmp_path: Path
) -> None:
    shape = {"layers": 3, "width": 64, "heads": 2, "mlp": 96, "context": 128}
    build_tiny(tmp_path, AutoTokenizer.from_pretrained(tiny), **shape)
    size = {"float32": 4, "bfloat16": 2}[dtype]
    for received, count, parameters in together(ranks, counted, tmp_path, dtype, sums, over, over=over):
        told = Traffic.of(parameters, ranks, size, 2, sums == "step", over)
        assert count > 1
        # Rows that no two ranks divide are padded.
        assert received == pytest.approx(told.step(count, updates=1) - told.version, rel=0.02)
