"""A tiny model on disk, and groups of random episodes for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from learner.data import prefix_tree
from learner.model.tiny import build_tiny
from learner.model.tokenizer import build_tokenizer
from rollout.wire.trajectory import EndReason, Group, Slot, Task, Trajectory, Turn
from tests.learner.dense import load

torch.set_num_threads(1)
TASK = Task.of("toy", 0)
GroupOf = Callable[..., Group]


@pytest.fixture(scope="module", autouse=True)
def even_short_prefixes_are_shared() -> Iterator[None]:
    """Episodes of tests are short: what they have in common is computed once all the same."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(prefix_tree, "LEAST_SHARED", 1)
        yield


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a two-layer Qwen3 with tied embeddings and grouped heads."""
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = build_tokenizer(folder, ["left", "right"])
    build_tiny(folder, tokenizer, layers=2, width=32, heads=4, mlp=48, context=128, seed=1)
    return folder


@pytest.fixture(scope="module")
def plain(tiny: Path) -> PreTrainedModel:
    """The tiny model as transformers has it."""
    return load(tiny)


@pytest.fixture(scope="session")
def group_of() -> GroupOf:
    """A function (group_id, rewards, seed=0, turns=2) -> Group of random episodes with those rewards."""

    def build(group_id: int, rewards: list[float], seed: int = 0, turns: int = 2) -> Group:
        rng = np.random.default_rng([seed, group_id])
        episodes = tuple(_episode(rng, group_id, i, reward, turns) for i, reward in enumerate(rewards))
        return Group(Slot(group_id, 0, TASK, 0), episodes)

    return build


def _episode(rng: np.random.Generator, group_id: int, index: int, reward: float, turns: int) -> Trajectory:
    steps = tuple(_step(rng, turn, reward if turn == turns - 1 else 0.0) for turn in range(turns))
    return Trajectory(group_id, 0, index, TASK, steps, EndReason.TERMINATED, success=reward > 0)


def _step(rng: np.random.Generator, turn: int, reward: float) -> Turn:
    prompt, action = int(rng.integers(2, 9)), int(rng.integers(1, 4))
    return Turn(
        turn=turn,
        segment=0,
        observation="",
        action="",
        prompt_ids=rng.integers(5, 100, prompt).astype(np.int32),
        action_ids=rng.integers(5, 100, action).astype(np.int32),
        behavior_logprobs=rng.normal(-4.5, 0.3, action).astype(np.float32),
        versions=np.zeros(action, np.int32),
        reward=reward,
        finish_reason="stop",
    )
