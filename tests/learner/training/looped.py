"""A learner's loop with what surrounds it: a replay buffer, a place for weights, another rank that listens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from learner.algorithm.schedule import OptimSettings
from learner.parallel.ranks import RankLost
from learner.settings import LearnerSettings, ModelSettings
from learner.stages.settings import SftSettings
from learner.training.learner import Learner
from learner.training.loop import LearnerLoop
from rollout.wire.partition import Partition
from rollout.wire.schema import encode
from rollout.wire.trajectory import DropReason, Group, Turn
from rollout.wire.weights import ByteArray, Handle, WeightUpdate, write_memory

Groups = Callable[..., Group]


class ReplayBuffer:
    """Gives the groups of each version, the same ones when asked again, and notes what it is told."""

    def __init__(self, group_of: Groups) -> None:
        self.group_of = group_of
        self.taken: list[int] = []
        self.landed_versions: list[int] = []
        self.discarded: list[int] = []
        self.broken = 0  # so many batches whose logprobs are not numbers come first

    async def discard(self, version: int, reason: DropReason) -> None:
        self.discarded.append(version)

    async def take(self, version: int, timeout_s: float, share: Partition) -> list[pa.RecordBatch]:
        self.taken.append(version)
        group = self.group_of(version, [1.0, 0.0, 0.5])
        return [encode(_broken(group) if len(self.taken) <= self.broken else group)]

    async def checkpointed(self, version: int) -> None:
        self.landed_versions.append(version)

    async def counts(self) -> dict[str, int]:
        return {"issued": len(self.taken)}


def _broken(group: Group) -> Group:
    def without_numbers(step: Turn) -> Turn:
        return replace(step, behavior_logprobs=np.full_like(step.behavior_logprobs, np.nan))

    episodes = [replace(t, turns=tuple(map(without_numbers, t.turns))) for t in group.trajectories]
    return replace(group, trajectories=tuple(episodes))


class Shelf:
    """A place for weights that counts what was put on it."""

    def __init__(self) -> None:
        self.placed = 0

    def __call__(self, arrays: Sequence[ByteArray]) -> tuple[Handle, Any]:
        self.placed += 1
        return write_memory(arrays)


class Setup:
    def __init__(
        self, tiny: Path, group_of: Groups, stages: Sequence[SftSettings] = (), rate: float = 3e-3
    ) -> None:
        self.learner = Learner(
            LearnerSettings(model=ModelSettings(path=str(tiny)), optim=OptimSettings(learning_rate=rate)),
            stages=stages,
        )
        self.replay_buffer = ReplayBuffer(group_of)
        self.shelf = Shelf()
        self.told: list[tuple[Any, ...]] = []  # the other ranks, of which there is one: it only listens
        self.gone_at: str | None = None  # the verb it does not live to end
        self.loop = LearnerLoop(
            self.learner, self.replay_buffer, self.shelf, "float32", take_seconds=5.0, tell=self._tell
        )

    def _tell(self, *words: Any) -> list[Any]:
        self.told.append(words)
        return [self._listen(words[0])]

    async def _listen(self, verb: str) -> None:
        if verb == self.gone_at:
            raise RankLost("rank 1 is gone")

    def holds(self, update: WeightUpdate) -> bool:
        """Whether what lies at the handle is what the learner's policy holds."""
        held = [tensor.detach().numpy() for _, tensor in self.learner.policy.named_weights()]
        found = [array.view(np.float32) for _, array in update.tensors()]
        return all(np.array_equal(a.ravel(), b) for a, b in zip(held, found, strict=True))
