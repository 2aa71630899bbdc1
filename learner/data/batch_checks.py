"""What keeps a batch from being learned from, found before anything is changed; every rank finds the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain

import numpy as np

from learner.data.prepare import Example
from learner.parallel.ranks import ALONE, Ranks
from rollout.wire.trajectory import Group

MOST_REFUSED = 3  # batches in a row


class BatchRefused(RuntimeError):
    """A batch can not be learned from: its numbers, its advantages, its loss or a gradient; nothing was changed."""


def require_groups(groups: Sequence[Group], compares: str | None = None, ranks: Ranks = ALONE) -> None:
    """BatchRefused for behaviour logprobs that are not finite, and for a group that lacks siblings.

    compares: the kind of estimator that compares siblings; None: it compares none.
    """
    _agree(chain(_alone(groups, compares) if compares else (), _unscored(groups)), ranks)


def require_rewards(examples: Sequence[Example], ranks: Ranks = ALONE) -> None:
    """BatchRefused for a reward, shaped as it is, that is not finite."""
    _agree(
        (
            f"group {each.trajectory.group_id}, episode {each.trajectory.index}: its reward is {each.episode.reward}"
            for each in examples
            if not np.isfinite(each.episode.reward)
        ),
        ranks,
    )


def _agree(wrong: Iterator[str], ranks: Ranks) -> None:
    # Asked of all, whoever found something: the others would wait for this rank in the next thing they do together.
    for said in ranks.gather(next(wrong, None)):
        if said:
            raise BatchRefused(said)


def _alone(groups: Sequence[Group], compares: str) -> Iterator[str]:
    for group in groups:
        if len(group.trainable) < 2:
            yield (
                f"group {group.slot.group_id} has {len(group.trainable)} trainable episodes; "
                f"advantage.kind={compares!r} compares at least 2"
            )


def _unscored(groups: Sequence[Group]) -> Iterator[str]:
    for group in groups:
        for trajectory in group.trainable:
            if not all(np.isfinite(step.behavior_logprobs).all() for step in trajectory.turns):
                yield (
                    f"group {group.slot.group_id}, episode {trajectory.index}: its behaviour logprobs are not finite"
                )
