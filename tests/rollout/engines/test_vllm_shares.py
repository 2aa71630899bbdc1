"""Copies out of published tensors: counted, and in chunks through two buffers where they go to a device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rollout.engines.vllm_shares import PinnedChunks, ShareCopies

CHUNK = 1024


class Copies(TorchDispatchMode):
    """Sizes of all copies, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default:
            self.nbytes.append(args[1].nbytes)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "source",
    [
        torch.arange(5000.0),
        torch.randn(300, 7),
        torch.randn(64, 50)[:, 10:30],  # the columns of a divided layer
        torch.randn(40, 30).T,
        torch.randn(3, 600),  # a row is larger than a chunk
        torch.randn(2, 5, 9, 16)[:, 1:4],
        torch.randn(10, 10).bfloat16(),
        torch.tensor(3.0),
        torch.empty(0, 4),
    ],
    ids=lambda source: "x".join(map(str, source.shape)) or "scalar",
)
def test_chunks_make_an_equal_copy_and_none_is_larger_than_a_buffer(source: Tensor) -> None:
    # Stands in for a device: its copies have ended when they are begun, so one stale buffer would be seen.
    target = torch.full_like(source, -1.0)
    with Copies() as copies:
        PinnedChunks(CHUNK, pinned=False).copy(target, source)
    assert torch.equal(target, source)
    assert max(copies.nbytes) <= CHUNK
    assert sum(copies.nbytes) == 2 * source.nbytes, "into a buffer, and out of it"


def test_a_share_is_counted_once_and_by_the_name_of_its_tensor() -> None:
    copied: list[tuple[str, Tensor]] = []
    layer, other = torch.zeros(4, 6), torch.zeros(8, 6)
    whole = torch.randn(8, 6)
    copies = ShareCopies(lambda name, part: copied.append((name, part)), PinnedChunks(pinned=False))
    copies.publish("layer.weight", whole)
    with copies:
        torch.empty(4, 6, device="meta").copy_(whole[2:6])  # vLLM counts so what a loader would copy
        layer.copy_(whole[2:6])
        other.copy_(2 * whole)  # not what was published
        other[:4].copy_(torch.ones(4, 6))
    other.copy_(whole)  # outside
    ((name, part),) = copied
    assert name == "layer.weight" and part is layer
    assert torch.equal(layer, whole[2:6])
    assert copies.copied_bytes == layer.nbytes
