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


def counted(ranks: Ranks, folder: Path, dtype: str) -> tuple[int, int, int]:
    """Bytes of whole tensors that a step gathered and summed, its rows, and the model's parameters."""
    learner = built(ranks, folder, {}, dtype=dtype)
    share = own(ranks, groups_of(3))
    gather, reduce, nbytes = dist.all_gather_single, dist.reduce_scatter_single, []

    def larger(*given: Any) -> int:
        return max(each.nbytes for each in given if isinstance(each, Tensor))

    def gathering(*given: Any, **named: Any) -> Any:
        nbytes.append(larger(*given, *named.values()))
        return gather(*given, **named)

    def reducing(*given: Any, **named: Any) -> Any:
        nbytes.append(larger(*given, *named.values()))
        return reduce(*given, **named)

    dist.all_gather_single, dist.reduce_scatter_single = gathering, reducing
    learner.step(share)
    parameters = sum(parameter.numel() for parameter in learner.policy.parameters())
    return sum(nbytes), max(ranks.gather(rows(share))), parameters


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2)])
def test_the_bytes_of_a_step_are_those_that_are_told(
    dtype: str, size: int, tiny: Path, tmp_path: Path
) -> None:
    shape = {"layers": 3, "width": 64, "heads": 2, "mlp": 96, "context": 128}
    build_tiny(tmp_path, AutoTokenizer.from_pretrained(tiny), **shape)
    ranks = 2
    for whole, count, parameters in together(ranks, counted, tmp_path, dtype):
        told = Traffic.of(parameters, ranks, size, 2)
        # Rows that no two ranks divide are padded.
        assert whole * (ranks - 1) / ranks == pytest.approx(count * told.row, rel=0.02)
