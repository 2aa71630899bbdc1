"""What several ranks publish of a mixture of experts, and how much each holds meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from learner.model.loading import layer_of
from learner.model.policy import Policy
from learner.parallel.ranks import Ranks
from learner.settings import LearnerSettings, ModelSettings
from learner.training.follower import Follower
from learner.training.learner import Learner
from learner.training.loop import LearnerLoop
from learner.training.publish import Snapshot, take_snapshot
from rollout.wire.weights import inline
from tests.families import build_family
from tests.learner.held import Held
from tests.learner.together import together


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


class Receiver:
    """A transfer of its own: it takes the live weights as they come."""

    def __init__(self, learner: Learner) -> None:
        self._learner = learner
        self.received: list[tuple[str, bytes]] = []

    async def publish(self, snapshot: Snapshot, workers: Mapping[str, Any]) -> list[Any]:
        """The tensors, whose names and shapes the snapshot has said."""
        assert not snapshot.arrays
        specs = snapshot.manifest.tensors
        weights = self._learner.policy.named_weights(torch.bfloat16)
        for spec, (name, tensor) in zip(specs, weights, strict=True):
            assert (spec.name, spec.shape, tensor.dtype) == (name, tuple(tensor.shape), torch.bfloat16)
            self.received.append((name, tensor.contiguous().view(torch.uint8).numpy().tobytes()))
        return []


def sent(ranks: Ranks, folder: Path) -> Any:
    """What a native transfer of rank 0 is given, and a snapshot's bytes."""
    learner = Learner(LearnerSettings(model=ModelSettings(path=str(folder))), ranks=ranks)
    nothing: Any = None

    async def follow() -> None:
        follower = Follower(learner, nothing, "bfloat16", 1.0)
        for verb in (follower.manifest, follower.send, follower.snapshot):
            await verb()

    async def lead() -> Any:
        receiver = Receiver(learner)
        loop = LearnerLoop(
            learner, nothing, lambda arrays: (inline(arrays), nothing), "bfloat16", 1.0, 2, receiver
        )
        await loop.publish_native({})
        update = await loop.publish_weights()
        return receiver.received, [(spec.name, array.tobytes()) for spec, array in update.tensors()]

    return asyncio.run(follow() if ranks.rank else lead())


def test_a_native_transfer_sends_what_the_ranks_gather_meanwhile(tmp_path: Path) -> None:
    build_family("Qwen3-30B-A3B", False, tmp_path, vocab_size=97)
    (received, stored), _ = together(2, sent, tmp_path)
    assert received == stored and len(stored) > 50


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
