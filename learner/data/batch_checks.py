"""Validation of a batch before the optimizer step; all ranks reach the same verdict."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain

import numpy as np

from learner.data.prepare import Example
from learner.parallel.ranks import ALONE, Ranks
from rollout.wire.trajectory import Group

MOST_REFUSED = 3  # refused batches in a row before the run ends


class BatchRefused(RuntimeError):
    """A batch cannot be trained on (its numbers, advantages, loss or a gradient); the learner's state is unchanged."""


class GroupsRefused(RuntimeError):
    """A step's groups cannot be learned from: set them aside, and ask for the step again when others were played."""


def require_groups(groups: Sequence[Group], compares: str | None = None, ranks: Ranks = ALONE) -> None:
    """BatchRefused for behavior logprobs that are not finite and for groups without siblings.

    compares: the kind of the estimator if it compares siblings, else None.
    """
    _agree(chain(_alone(groups, compares) if compares else (), _unscored(groups)), ranks)


def require_rewards(examples: Sequence[Example], ranks: Ranks = ALONE) -> None:
    """BatchRefused for a shaped reward that is not finite."""
    _agree(
        (
            f"group {each.trajectory.group_id}, episode {each.trajectory.index}: its reward is {each.episode.reward}"
            for each in examples
            if not np.isfinite(each.episode.reward)
        ),
        ranks,
    )


def _agree(wrong: Iterator[str], ranks: Ranks) -> None:
    # All ranks gather and raise together: otherwise the others would wait for this rank in the next collective call.
    for said in ranks.gather(next(wrong, None)):
        if said:
            raise BatchRefused(said)


def _alone(groups: Sequence[Group], compares: str) -> Iterator[str]:
    for group in groups:
        if len(group.trainable) < 2:
            yield (
                f"group {group.slot.group_id} has {len(group.trainable)} trainable episodes; "
                f"advantage.kind={compares!r} needs at least 2"
            )


def _unscored(groups: Sequence[Group]) -> Iterator[str]:
    for group in groups:
        for trajectory in group.trainable:
            if not all(np.isfinite(step.behavior_logprobs).all() for step in trajectory.turns):
                yield (
                    f"group {group.slot.group_id}, episode {trajectory.index}: its behavior logprobs are not finite"
                )
