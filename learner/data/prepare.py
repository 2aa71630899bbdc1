"""Examples of one learner step: a trajectory, its episode, and columns of values of each sampled token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from torch import Tensor

from learner.algorithm.advantages import overlong_penalty
from learner.algorithm.aggregation import Aggregation, token_weights
from learner.algorithm.estimators import Episode
from learner.algorithm.regularizers import OverlongSettings
from learner.data.batch import MicroBatch, TokenSequence, level, row_of, rows_of, sequences_of
from learner.parallel.ranks import ALONE, Ranks
from rollout.wire.trajectory import Float32Array, Trajectory

# Computes a value of each scored token of a row, [N], or several, [N, C]
TokenFunction = Callable[[MicroBatch], Tensor]


@dataclass(slots=True)
class Example:
    """One trainable episode on its way to a loss. N: its sampled tokens, in order."""

    trajectory: Trajectory
    episode: Episode
    advantages_N: Float32Array
    columns: dict[str, Float32Array] = field(default_factory=dict)  # [N] each: see TokenSequence.columns
    reused: bool = False  # a group that an earlier step has learned from

    @classmethod
    def of(
        cls, trajectory: Trajectory, overlong: OverlongSettings | None = None, reused: bool = False
    ) -> Example:
        """The example of a trajectory, with the reward shaped and advantages of zero."""
        episode = Episode.of(trajectory)
        if overlong is not None:
            if episode.sides_K:
                raise ValueError(
                    "algorithm.overlong penalizes whole episodes, but an episode of self-play has two players; remove "
                    "it"
                )
            cost = overlong.weight * overlong_penalty(
                trajectory.num_sampled, overlong.tokens, overlong.margin
            )
            rewards_K = episode.rewards_K.copy()
            rewards_K[-1] += cost
            episode = replace(episode, rewards_K=rewards_K)
        return cls(trajectory, episode, np.zeros(trajectory.num_sampled, np.float32), reused=reused)

    @property
    def behavior_logprobs_N(self) -> Float32Array:
        """Logprobs as recorded while sampling."""
        return np.concatenate([turn.behavior_logprobs for turn in self.trajectory.turns])

    def sequences(self, weight: float = 1.0) -> list[TokenSequence]:
        """The example's segments. weight: of each sampled token in the loss."""
        return sequences_of(self.trajectory, self.advantages_N, weight, self.columns)


def weighed(
    examples: Sequence[Example], how: Aggregation, length: int | None = None, ranks: Ranks = ALONE
) -> list[TokenSequence]:
    """The sequences of these episodes, each sampled token with its weight among those of all ranks.

    length: what how="constant" divides by.
    """
    sampled_E = [example.trajectory.num_sampled for example in examples]
    weights = token_weights(sampled_E, how, length, ranks)
    pairs = zip(examples, weights, strict=True)
    return [sequence for example, weight in pairs for sequence in example.sequences(weight)]


def of_tokens(
    examples: Sequence[Example], compute: TokenFunction, tokens_per_row: int, ranks: Ranks = ALONE
) -> list[Float32Array]:
    """Apply `compute` to every sampled token: float32 [N] for each example. Ranks with fewer rows compute idle ones."""
    by_example = [example.sequences() for example in examples]
    found = of_sequences([s for sequences in by_example for s in sequences], compute, tokens_per_row, ranks)
    remaining = iter(found)
    none_0 = np.zeros(0, np.float32)
    return [np.concatenate([none_0, *(next(remaining) for _ in sequences)]) for sequences in by_example]


def and_after(
    examples: Sequence[Example],
    compute: TokenFunction,
    tokens_per_row: int,
    ranks: Ranks = ALONE,
    columns: int = 1,
) -> list[tuple[Float32Array, Float32Array]]:
    """Apply `compute` before every sampled token and after the last one: float32 ([N, C], [C]) for each example.

    columns: C, the numbers that `compute` gives for each token. A dummy token after each sequence makes the position
    after its last token one like the others.
    """
    by_example = [[followed(s) for s in example.sequences()] for example in examples]
    found = of_sequences([s for sequences in by_example for s in sequences], compute, tokens_per_row, ranks)
    remaining = iter(found)
    none_0C = np.zeros((0, columns), np.float32)
    values = []
    for sequences in by_example:
        parts = [next(remaining) for _ in sequences]
        before_NC = np.concatenate([none_0C, *(part[:-1] for part in parts)])
        values.append((before_NC, parts[-1][-1] if parts else np.zeros(columns, np.float32)))
    return values


def followed(sequence: TokenSequence) -> TokenSequence:
    """The sequence and a dummy token, which counts as sampled, so that the position after its last token is scored."""
    return replace(
        sequence,
        token_ids_T=np.append(sequence.token_ids_T, np.int32(0)),
        sampled_T=np.append(sequence.sampled_T, True),
        behavior_logprobs_T=np.append(sequence.behavior_logprobs_T, np.float32(0)),
        advantages_T=np.append(sequence.advantages_T, np.float32(0)),
        versions_T=np.append(sequence.versions_T, np.int32(0)),
        columns={},
    )


def of_sequences(
    sequences: Sequence[TokenSequence], compute: TokenFunction, tokens_per_row: int, ranks: Ranks
) -> list[Float32Array]:
    """Apply `compute` to every sampled token: float32 [N] or [N, C] for each sequence."""
    found: list[Float32Array] = [np.zeros(0, np.float32)] * len(sequences)
    rows = rows_of(sequences, tokens_per_row)
    micro_batches = level([row_of([sequences[place] for place in row]) for row in rows], ranks)
    computed = [compute(micro).detach().float().cpu().numpy() for micro in micro_batches]
    for row, computed_N in zip(rows, computed, strict=False):  # idle rows at the end are dropped
        borders = np.cumsum([sequences[place].num_sampled for place in row])[:-1]
        for place, part in zip(row, np.split(computed_N, borders), strict=True):
            found[place] = part
    return found
