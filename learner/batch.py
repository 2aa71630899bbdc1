"""From trajectories to packed micro-batches: whole sequences end to end in one row, no padding.

A sequence is one segment of one trajectory: the prompt and action ids of its steps in order. The hidden state
at token t - 1 predicts token t, so that only the tokens before sampled ones are scored, and the last token of
a sequence is a target but never an input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from learner.advantages import broadcast
from rollout.wire.trajectory import Float32Array, Int32Array, Step, Trajectory

NOT_SAMPLED = -1  # in versions_T: no weights sampled this token


@dataclass(frozen=True, slots=True)
class TokenSequence:
    """One segment of one trajectory, token by token; arrays are [T]."""

    token_ids_T: Int32Array
    sampled_T: NDArray[np.bool_]  # the policy chose this token
    behavior_logprobs_T: Float32Array  # nats, 0 where not sampled
    advantages_T: Float32Array  # 0 where not sampled
    versions_T: Int32Array  # NOT_SAMPLED where not sampled

    @property
    def num_sampled(self) -> int:
        return int(self.sampled_T.sum())

    @property
    def num_inputs(self) -> int:
        """Tokens it adds to a packed row."""
        return len(self.token_ids_T) - 1


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """One packed row. [T] over input tokens, [N] over scored tokens, [B] over sequences."""

    input_ids_T: Tensor  # int64
    position_ids_T: Tensor  # int64, from 0 in every sequence
    sequence_ids_T: Tensor  # int64, 0..B-1
    cu_seqlens_B: Tensor  # int32 [B + 1], borders of the sequences in the row
    longest: int
    score_index_N: Tensor  # int64, places in the row whose hidden state predicts a sampled token
    targets_N: Tensor  # int64, those sampled tokens
    behavior_logprobs_N: Tensor  # float32
    advantages_N: Tensor  # float32
    versions_N: Tensor  # int64
    proximal_logprobs_N: Tensor | None = None  # float32; None: whatever the algorithm takes without one

    def to(self, device: torch.device) -> MicroBatch:
        """The same row on another device."""
        if device.type == self.input_ids_T.device.type:
            return self
        proximal_N = self.proximal_logprobs_N
        return MicroBatch(
            input_ids_T=self.input_ids_T.to(device),
            position_ids_T=self.position_ids_T.to(device),
            sequence_ids_T=self.sequence_ids_T.to(device),
            cu_seqlens_B=self.cu_seqlens_B.to(device),
            longest=self.longest,
            score_index_N=self.score_index_N.to(device),
            targets_N=self.targets_N.to(device),
            behavior_logprobs_N=self.behavior_logprobs_N.to(device),
            advantages_N=self.advantages_N.to(device),
            versions_N=self.versions_N.to(device),
            proximal_logprobs_N=None if proximal_N is None else proximal_N.to(device),
        )


@dataclass(frozen=True, slots=True)
class Batch:
    """Everything one optimizer step sees."""

    micro_batches: tuple[MicroBatch, ...]
    sampled_tokens: int  # over ALL sequences, skipped ones too: the denominator of the loss
    sequences: int
    skipped_sequences: int  # left out of the forward pass: no advantage anywhere


def sequences_of(trajectory: Trajectory, advantage: float) -> list[TokenSequence]:
    """The segments of a trajectory that hold a sampled token, each with the trajectory's advantage.

    ValueError for a segment that opens with a sampled token: nothing predicts it.
    """
    segments = [list(steps) for _, steps in groupby(trajectory.steps, key=lambda step: step.segment)]
    found = [_sequence(steps, advantage) for steps in segments if any(len(step.action_ids) for step in steps)]
    if any(sequence.sampled_T[0] for sequence in found):
        where = f"group {trajectory.group_id}, episode {trajectory.index}"
        raise ValueError(
            f"{where}: a segment opens with a sampled token; a prompt of at least one token must precede"
        )
    return found


def _sequence(steps: Sequence[Step], advantage: float) -> TokenSequence:
    ids, sampled, logprobs, versions = [], [], [], []
    for step in steps:
        prompt, action = len(step.prompt_ids), len(step.action_ids)
        ids += [step.prompt_ids, step.action_ids]
        sampled += [np.zeros(prompt, bool), np.ones(action, bool)]
        logprobs += [np.zeros(prompt, np.float32), step.behavior_logprobs]
        versions += [np.full(prompt, NOT_SAMPLED, np.int32), step.versions]
    sampled_T = np.concatenate(sampled)
    return TokenSequence(
        token_ids_T=np.concatenate(ids),
        sampled_T=sampled_T,
        behavior_logprobs_T=np.concatenate(logprobs),
        advantages_T=broadcast(advantage, sampled_T),
        versions_T=np.concatenate(versions),
    )


def pack(
    sequences: Sequence[TokenSequence],
    tokens_per_microbatch: int,
    context: int,
    skip_zero_advantage: bool = False,
) -> Batch:
    """Pack sequences into rows of at most tokens_per_microbatch input tokens (a longer one gets its own row).

    First-fit-decreasing (Johnson 1973); inside a row sequences stand in order of falling length, which packed
    attention relies on for speed. A sequence whose advantages are all zero has no gradient under the policy
    loss: with skip_zero_advantage it is not computed, but still counted in `sampled_tokens`. ValueError for a
    sequence longer than the model's context.
    """
    longest = max((len(s.token_ids_T) for s in sequences), default=0)
    if longest > context:
        raise ValueError(
            f"a sequence of {longest} tokens exceeds the model's context of {context}; shorten episodes"
        )
    kept = [s for s in sequences if not skip_zero_advantage or s.advantages_T.any()]
    rows: list[list[TokenSequence]] = []
    room: list[int] = []
    for sequence in sorted(kept, key=lambda s: s.num_inputs, reverse=True):
        size = sequence.num_inputs
        row = next((i for i, free in enumerate(room) if free >= size), None)
        if row is None:
            rows.append([sequence])
            room.append(tokens_per_microbatch - size)
        else:
            rows[row].append(sequence)
            room[row] -= size
    return Batch(
        micro_batches=tuple(_row(row) for row in rows),
        sampled_tokens=sum(s.num_sampled for s in sequences),
        sequences=len(sequences),
        skipped_sequences=len(sequences) - len(kept),
    )


def _row(sequences: Sequence[TokenSequence]) -> MicroBatch:
    lengths_B = np.array([s.num_inputs for s in sequences])
    cu_seqlens_B = np.concatenate([[0], lengths_B.cumsum()])
    sampled_T = np.concatenate([s.sampled_T[1:] for s in sequences])

    def scored(arrays: list[NDArray[np.generic]]) -> NDArray[np.generic]:
        return np.concatenate([array[1:] for array in arrays])[sampled_T]

    return MicroBatch(
        input_ids_T=_int64(np.concatenate([s.token_ids_T[:-1] for s in sequences])),
        position_ids_T=_int64(np.concatenate([np.arange(length) for length in lengths_B])),
        sequence_ids_T=_int64(np.repeat(np.arange(len(sequences)), lengths_B)),
        cu_seqlens_B=torch.from_numpy(cu_seqlens_B.astype(np.int32)),
        longest=int(lengths_B.max()),
        score_index_N=_int64(np.flatnonzero(sampled_T)),
        targets_N=_int64(scored([s.token_ids_T for s in sequences])),
        behavior_logprobs_N=_float32(scored([s.behavior_logprobs_T for s in sequences])),
        advantages_N=_float32(scored([s.advantages_T for s in sequences])),
        versions_N=_int64(scored([s.versions_T for s in sequences])),
    )


def _int64(array: NDArray[np.generic]) -> Tensor:
    return torch.from_numpy(array.astype(np.int64))


def _float32(array: NDArray[np.generic]) -> Tensor:
    return torch.from_numpy(array.astype(np.float32))
