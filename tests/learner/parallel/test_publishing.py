"""What several ranks publish of a mixture of experts, and how much each holds meanwhile."""

from __future__ import annotations

import weakref
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from learner.model.loading import layer_of
from learner.model.policy import Policy
from learner.parallel.ranks import Ranks
from learner.settings import ModelSettings
from learner.training.publish import take_snapshot
from tests.families import build_family
from tests.learner.together import together


class Held(TorchDispatchMode):
    """Counts the bytes of storages that operations make, while they live: `most` at once."""

    def __init__(self) -> None:
        super().__init__()
        self.most, self._now, self._known = 0, 0, set[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {
            each.untyped_storage()._cdata for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)
        }
        for each in tree_leaves(result):
            if isinstance(each, Tensor) and not each.is_meta:
                self._hold(each.untyped_storage(), given)
        return result

    def _hold(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        key = storage._cdata
        if key in self._known or key in given:
            return
        self._known.add(key)
        self._now += storage.nbytes()
        self.most = max(self.most, self._now)
        weakref.finalize(storage, self._free, key, storage.nbytes())

    def _free(self, key: int, nbytes: int) -> None:
        self._known.discard(key)
        self._now -= nbytes


def published(ranks: Ranks, folder: Path) -> tuple[Any, int, int, int]:
    """A version as engines get it, and bytes held while its tensors come; of the largest layer; of all."""
    policy = Policy(ModelSettings(path=str(folder)), ranks, examined=True)
    with Held() as held:
        for _ in policy.named_weights(torch.bfloat16):
            pass
    sizes = [
        sum(parameter.nbytes for _, parameter in layer)  # of the whole tensors, float32
        for _, layer in groupby(policy.model.named_parameters(), key=lambda named: layer_of(named[0]))
    ]
    snapshot = take_snapshot(policy, 3, "bfloat16")
    arrays = [array.tobytes() for array in snapshot.arrays]
    return (snapshot.manifest.tensors, arrays), held.most, max(sizes), sum(sizes)


@pytest.mark.parametrize("size", [2, 4])
def test_a_version_is_gathered_a_layer_at_a_time(size: int, tmp_path: Path) -> None:
    build_family("Qwen3-30B-A3B", False, tmp_path, num_hidden_layers=6, vocab_size=97)
    stored = load_file(tmp_path / "model.safetensors")
    lead, *others = together(size, published, tmp_path)
    (specs, arrays), *_ = lead
    assert {spec.name: spec.shape for spec in specs} == {name: tuple(t.shape) for name, t in stored.items()}
    for spec, array in zip(specs, arrays, strict=True):
        cast = stored[spec.name].to(torch.bfloat16).flatten().view(torch.uint8).numpy().tobytes()
        assert array == cast, spec.name
    for _, most, layer, whole in (lead, *others):
        assert 0 < most <= layer < whole / 3
    assert all(not arrays for (_, arrays), *_ in others)
