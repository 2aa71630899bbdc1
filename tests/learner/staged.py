"""A stage of a learner made to its end, a learner that was interrupted, and what a plain model makes of an episode."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from learner.training.learner import Learner
from rollout.wire.trajectory import Group, Trajectory


def learned(learner: Learner, groups: Sequence[Group], index: int = 0) -> list[dict[str, float]]:
    """The metrics of every step of the stage on these groups."""
    made, steps = learner.begin_stage(index, groups)
    rows = learner.advance_stage(steps)
    assert len(rows) == steps - made
    return rows


def interrupted(
    made: Callable[[], Learner], batches: Sequence[Sequence[Group]], run: Path
) -> tuple[Learner, Learner]:
    """A learner that has made a step on each batch, and one that went on from another's checkpoint half way.

    Their metrics are the same.
    """
    straight, first, resumed = made(), made(), made()
    expected, half = [straight.step(groups) for groups in batches], len(batches) // 2
    for groups in batches[:half]:
        first.step(groups)
    first.save(run)
    resumed.load(run)
    assert [resumed.step(groups) for groups in batches[half:]] == expected[half:]
    return straight, resumed


def action_logprobs(model: torch.nn.Module, episode: Trajectory) -> torch.Tensor:
    """Log-probability of each token of an episode's actions: the episode alone, by transformers and one softmax."""
    parts = [ids for turn in episode.turns for ids in (turn.prompt_ids, turn.action_ids)]
    ids = torch.from_numpy(np.concatenate(parts)).long()
    acted = np.concatenate([np.full(len(part), place % 2) for place, part in enumerate(parts)])
    logprobs = model(ids[None]).logits[0].log_softmax(-1)
    return torch.stack([logprobs[place - 1, ids[place]] for place in np.flatnonzero(acted)])
