"""Supervised fine-tuning makes the steps of a plain loop over a plain model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from learner.algorithm.schedule import OptimSettings
from learner.settings import LearnerSettings, ModelSettings
from learner.stages.settings import SftSettings
from learner.training.learner import Learner
from rollout.wire.trajectory import Group
from tests.learner.staged import action_logprobs, learned

Groups = Callable[..., Group]
SEED, EPOCHS, SIZE, RATE = 3, 2, 4, 5e-3


def learner_of(tiny: Path, *stages: SftSettings) -> Learner:
    settings = LearnerSettings(model=ModelSettings(path=str(tiny)), tokens_per_microbatch=50)
    return Learner(settings, seed=SEED, stages=stages)


def test_sft_makes_the_steps_of_a_plain_loop(tiny: Path, group_of: Groups) -> None:
    groups = [group_of(g, [1.0]) for g in range(9)]  # demonstrations need no siblings
    optim = OptimSettings(learning_rate=RATE, max_grad_norm=1e9)
    learner = learner_of(tiny, SftSettings(optim=optim, epochs=EPOCHS, episodes_per_step=SIZE))
    rows = learned(learner, groups)

    model = AutoModelForCausalLM.from_pretrained(tiny)
    adamw = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    rng, losses = np.random.default_rng(SEED), []
    for _ in range(EPOCHS):
        order = rng.permutation(len(groups))
        for start in range(0, len(order), SIZE):
            chosen = [groups[place].trajectories[0] for place in order[start : start + SIZE]]
            adamw.zero_grad()
            loss = -torch.cat([action_logprobs(model, episode) for episode in chosen]).mean()
            loss.backward()
            adamw.step()
            losses.append(loss.item())
    assert [row["loss"] for row in rows] == pytest.approx(losses, abs=1e-4)
    assert [row["epoch"] for row in rows] == [0, 0, 0, 1, 1, 1]
    assert learner.version == 0


def test_sft_lowers_the_cross_entropy(tiny: Path, group_of: Groups) -> None:
    sft = SftSettings(optim=OptimSettings(learning_rate=5e-3), epochs=6, episodes_per_step=4)
    losses = [row["loss"] for row in learned(learner_of(tiny, sft), [group_of(g, [1.0]) for g in range(9)])]
    assert len(losses) == sft.steps(9) == 18
    assert np.mean(losses[-3:]) < np.mean(losses[:3]) - 0.3
