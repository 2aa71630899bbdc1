"""Packing of trajectories into micro-batches: one row of sequences without padding, common prefixes only once.

A sequence is one segment of one trajectory: the prompt and action ids of its turns in order. The hidden state at token
t - 1 predicts token t: only tokens before sampled ones are scored, and the last token of a sequence is a target but
never an input. The row holds the prefix tree of the sequences' inputs (`prefix_tree`). Losses never see the tree: what
they read is of the original sequences, token by token.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import chain, groupby, repeat, takewhile
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from learner.data.prefix_tree import PrefixTree, divided
from learner.parallel.ranks import Ranks
from rollout.wire.images import images_in
from rollout.wire.trajectory import Float32Array, Int32Array, Trajectory, Turn, UInt8Array

_WORDS = 16  # different tokens of a row that stands for others; every vocabulary has as many

NOT_SAMPLED = -1  # in versions_T: a token that was not sampled


@dataclass(frozen=True, slots=True)
class SequencePictures:
    """The pictures of a sequence, in the order of their placeholders among its tokens."""

    images: tuple[str, ...]  # data URLs
    where: str  # group, episode and segment, for messages


@dataclass(frozen=True, slots=True)
class TokenSequence:
    """One segment of one trajectory, token by token; arrays are [T]."""

    token_ids_T: Int32Array
    sampled_T: NDArray[np.bool_]  # sampled by the policy
    behavior_logprobs_T: Float32Array  # nats, 0 where not sampled
    advantages_T: Float32Array  # 0 where not sampled
    versions_T: Int32Array  # NOT_SAMPLED where not sampled
    weight: float = 1.0  # of each sampled token in the loss
    # Further values of sampled tokens, by the names of MicroBatch's optional tensors without their _N.
    columns: Mapping[str, Float32Array] = field(default_factory=dict)
    pictures: SequencePictures | None = None  # None: text only
    # [I, B] bytes of the experts that the engine chose for its first I inputs; None: the model routes all of them.
    routed_IB: UInt8Array | None = None

    @property
    def num_sampled(self) -> int:
        return int(self.sampled_T.sum())

    @property
    def num_inputs(self) -> int:
        """Tokens that the model reads of the sequence."""
        return len(self.token_ids_T) - 1

    @property
    def inputs_T(self) -> Int32Array:
        """Those tokens."""
        return self.token_ids_T[:-1]

    @property
    def kind(self) -> tuple[str, ...]:
        """Sequences of different kinds share nothing: of other pictures, or only one of them with stored experts."""
        return ("" if self.routed_IB is None else "routed", *(self.pictures.images if self.pictures else ()))


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """One packed row: [T] over its tokens, nodes of the prefix tree; [B] over sequences; [N] over their scored tokens,
    sequence by sequence. [M] over different pairs of a node and a sampled token after it: the head computes each once.
    """

    tree: PrefixTree  # on the host
    input_ids_T: Tensor  # int64
    position_ids_T: Tensor  # int64, from 0 in every sequence
    score_index_M: Tensor  # int64, nodes whose hidden state predicts a sampled token
    targets_M: Tensor  # int64, those sampled tokens
    expand_N: Tensor  # int64, the pair of each scored token: 0..M-1
    sequence_N: Tensor  # int64, the sequence of each scored token: 0..B-1
    behavior_logprobs_N: Tensor  # float32
    advantages_N: Tensor  # float32
    versions_N: Tensor  # int64
    weights_N: Tensor  # float32, of each token in the loss
    proximal_logprobs_N: Tensor | None = None  # float32; None: the algorithm's default (`proximal`)
    reference_logprobs_N: Tensor | None = None  # float32; the reference policy's
    teacher_logprobs_N: Tensor | None = None  # float32; the teacher's, in distillation
    values_N: Tensor | None = None  # float32; the critic's before the first update on the batch
    value_targets_N: Tensor | None = None  # float32
    routed_TB: Tensor | None = None  # uint8, bytes of the experts that the engine chose; None: of no token
    routed_T: Tensor | None = None  # bool, tokens for which it did; None: all
    pictures_B: tuple[SequencePictures | None, ...] = ()  # of every sequence; empty if none has pictures
    # Weight version -> number of scored tokens that it sampled; on the host, without a device synchronization.
    tokens_by_version: Mapping[int, int] = field(default_factory=dict)

    @property
    def targets_N(self) -> Tensor:
        """The scored tokens themselves: int64."""
        return self.expanded(self.targets_M)

    def expanded(self, values_M: Tensor) -> Tensor:
        """Values of scored tokens from values of pairs: [N, ...] from [M, ...]."""
        # Pairs are in the order in which tokens first have them: with as many pairs as tokens they are the tokens.
        same = len(self.score_index_M) == len(self.expand_N)
        return values_M if same else values_M.index_select(0, self.expand_N)

    def to(self, device: torch.device) -> MicroBatch:
        """The same row on another device."""
        if device.type == self.input_ids_T.device.type:
            return self
        found = {item.name: getattr(self, item.name) for item in fields(self)}
        moved: dict[str, Any] = {
            name: value.to(device) for name, value in found.items() if isinstance(value, Tensor)
        }
        return replace(self, **moved)


@dataclass(frozen=True, slots=True)
class Batch:
    """The input of one optimizer step."""

    micro_batches: tuple[MicroBatch, ...]
    sampled_tokens: int  # over ALL sequences, skipped ones too
    sequences: int
    skipped_sequences: int  # left out of the forward pass: no advantage anywhere


def sequences_of(
    trajectory: Trajectory,
    advantages_N: Float32Array,
    weight: float = 1.0,
    columns: Mapping[str, Float32Array] | None = None,
) -> list[TokenSequence]:
    """The segments of a trajectory that hold a sampled token, with the values of its N sampled tokens.

    advantages_N and columns: float32 [N] in the order of the tokens. ValueError for a segment that begins with a
    sampled token, which no hidden state predicts.
    """
    segments = [list(steps) for _, steps in groupby(trajectory.turns, key=lambda step: step.segment)]
    found = []
    start = 0
    for steps in segments:
        here = slice(start, start + sum(len(step.action_ids) for step in steps))
        start = here.stop
        if here.start == here.stop:
            continue
        known = {name: column_N[here] for name, column_N in (columns or {}).items()}
        where = f"group {trajectory.group_id}, episode {trajectory.index}"
        images = tuple(chain.from_iterable(images_in(step.observation) for step in steps))
        pictures = SequencePictures(images, f"{where}, segment {steps[0].segment}") if images else None
        sequence = _sequence(steps, advantages_N[here], weight, known, pictures)
        if sequence.sampled_T[0]:
            raise ValueError(
                f"{where}: a segment begins with a sampled token; a prompt of at least one token must precede it"
            )
        found.append(sequence)
    return found


def _sequence(
    steps: Sequence[Turn],
    advantages_N: Float32Array,
    weight: float,
    columns: Mapping[str, Float32Array],
    pictures: SequencePictures | None,
) -> TokenSequence:
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
        advantages_T=_spread(advantages_N, sampled_T),
        versions_T=np.concatenate(versions),
        weight=weight,
        columns={name: _spread(column_N, sampled_T) for name, column_N in columns.items()},
        pictures=pictures,
        routed_IB=_routed(steps),
    )


def _routed(steps: Sequence[Turn]) -> UInt8Array | None:
    """The experts of the segment's inputs, up to the first turn that was sampled without recording them."""
    stored = takewhile(lambda rows_XB: rows_XB is not None, (step.routed_experts for step in steps))
    known = [rows_XB for rows_XB in stored if rows_XB is not None]
    # The first row is of the token before the segment.
    return np.concatenate(known)[1:] if known else None


def _spread(values_N: Float32Array, sampled_T: NDArray[np.bool_]) -> Float32Array:
    """Scatter values of sampled tokens to their positions, with zeros elsewhere: [N] -> [T]."""
    out_T = np.zeros(len(sampled_T), np.float32)
    out_T[sampled_T] = values_N
    return out_T


def arrange(sizes: Sequence[int], tokens_per_row: int) -> list[list[int]]:
    """Bin packing of items into rows of at most tokens_per_row tokens; a longer item gets its own row.

    First-fit-decreasing (Johnson 1973). Returns item numbers, row by row, those of a row in order of decreasing size.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for item in sorted(range(len(sizes)), key=lambda item: sizes[item], reverse=True):
        row = next((i for i, free in enumerate(room) if free >= sizes[item]), None)
        if row is None:
            rows.append([item])
            room.append(tokens_per_row - sizes[item])
        else:
            rows[row].append(item)
            room[row] -= sizes[item]
    return rows


def rows_of(sequences: Sequence[TokenSequence], tokens_per_row: int, share: bool = True) -> list[list[int]]:
    """Numbers of the sequences, row by row, such that a row has at most tokens_per_row different tokens.

    Sequences that share a prefix are in the same row, unless their tree is too large for one. share: as in `row_of`.
    """
    if not share:
        return arrange([s.num_inputs for s in sequences], tokens_per_row)
    parts = divided(*_shared_by(sequences), tokens_per_row)
    rows = arrange([size for _, size in parts], tokens_per_row)
    return [[item for part in row for item in parts[part][0]] for row in rows]


def pack(
    sequences: Sequence[TokenSequence],
    tokens_per_microbatch: int,
    context: int,
    skip_zero_advantage: bool = False,
    share: bool = True,
) -> Batch:
    """Pack sequences into rows of at most tokens_per_microbatch input tokens; share: as in `row_of`.

    A sequence whose advantages are all zero has no gradient under the policy loss: with skip_zero_advantage it is left
    out of the forward pass but counted in `sampled_tokens`. ValueError for a sequence longer than the model's context.
    """
    longest = max((len(s.token_ids_T) for s in sequences), default=0)
    if longest > context:
        raise ValueError(
            f"a sequence of {longest} tokens exceeds the model's context of {context}; lower rollout.context_tokens"
        )
    kept = [s for s in sequences if not skip_zero_advantage or s.advantages_T.any()]
    rows = rows_of(kept, tokens_per_microbatch, share)
    return Batch(
        micro_batches=tuple(row_of([kept[item] for item in row], share) for row in rows),
        sampled_tokens=sum(s.num_sampled for s in sequences),
        sequences=len(sequences),
        skipped_sequences=len(sequences) - len(kept),
    )


def row_of(sequences: Sequence[TokenSequence], share: bool = True) -> MicroBatch:
    """Pack these sequences into one row; all have the same columns.

    share: compute what sequences have in common once. Without it they lie end to end; the results are the same.
    """
    tree = (
        PrefixTree.of(*_shared_by(sequences))
        if share
        else PrefixTree.apart([s.num_inputs for s in sequences])
    )
    input_ids_T = np.zeros(tree.tokens, np.int32)
    for item, shared in tree.brought:
        input_ids_T[tree.paths_B[item][shared:]] = sequences[item].inputs_T[shared:]
    sampled_T = np.concatenate([s.sampled_T[1:] for s in sequences])

    def scored(arrays: Iterable[NDArray[np.generic]]) -> NDArray[np.generic]:
        return np.concatenate(list(arrays))[sampled_T]

    nodes_N = scored(tree.paths_B).astype(np.int64)
    targets_N = scored(s.token_ids_T[1:] for s in sequences).astype(np.int64)
    first_M, expand_N = _different(nodes_N, targets_N)
    versions_N = scored(s.versions_T[1:] for s in sequences)
    versions, counts = np.unique(versions_N, return_counts=True)
    numbers_B = [s.num_sampled for s in sequences]
    return MicroBatch(
        tree=tree,
        input_ids_T=_int64(input_ids_T),
        position_ids_T=_int64(tree.depths_T),
        score_index_M=_int64(nodes_N[first_M]),
        targets_M=_int64(targets_N[first_M]),
        expand_N=_int64(expand_N),
        sequence_N=_int64(np.repeat(np.arange(len(sequences)), numbers_B)),
        behavior_logprobs_N=_float32(scored(s.behavior_logprobs_T[1:] for s in sequences)),
        advantages_N=_float32(scored(s.advantages_T[1:] for s in sequences)),
        versions_N=_int64(versions_N),
        pictures_B=tuple(s.pictures for s in sequences) if any(s.pictures for s in sequences) else (),
        tokens_by_version=dict(zip(versions.tolist(), counts.tolist(), strict=True)),
        weights_N=_float32(np.repeat([s.weight for s in sequences], numbers_B)),
        **_row_routing(sequences, tree),
        **{
            f"{name}_N": _float32(scored(s.columns[name][1:] for s in sequences))
            for name in sequences[0].columns
        },
    )


def _shared_by(
    sequences: Sequence[TokenSequence],
) -> tuple[list[Int32Array], list[tuple[str, ...]], list[UInt8Array | None]]:
    """What sequences must have in common to be computed once: tokens, pictures and experts."""
    return [s.inputs_T for s in sequences], [s.kind for s in sequences], [s.routed_IB for s in sequences]


def _row_routing(sequences: Sequence[TokenSequence], tree: PrefixTree) -> dict[str, Tensor]:
    """The optional tensors of a row's stored experts."""
    size = max((s.routed_IB.shape[1] for s in sequences if s.routed_IB is not None), default=0)
    if not size:
        return {}
    routed_TB, known_T = np.zeros((tree.tokens, size), np.uint8), np.zeros(tree.tokens, bool)
    for item, shared in tree.brought:
        if (routed_IB := sequences[item].routed_IB) is not None:
            brought = tree.paths_B[item][shared : len(routed_IB)]
            routed_TB[brought], known_T[brought] = routed_IB[shared:], True
    found = {"routed_TB": torch.from_numpy(routed_TB)}
    return found if known_T.all() else found | {"routed_T": torch.from_numpy(known_T)}


def _different(
    nodes_N: NDArray[np.int64], targets_N: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Different pairs in the order in which they first occur: the token of each [M], and the pair of each token [N]."""
    pairs_N = nodes_N << 32 | targets_N
    _, first_M, sorted_N = np.unique(pairs_N, return_index=True, return_inverse=True)
    rank_M = np.empty(len(first_M), np.int64)
    rank_M[first_M.argsort()] = np.arange(len(first_M))
    return np.sort(first_M), rank_M[sorted_N]


def longest_row(longest: int, tokens_per_microbatch: int) -> MicroBatch:
    """The row of the largest memory: full of sequences of `longest` tokens, all sampled except the first of each.

    Tokens differ, so that a router does not send all of them to the same experts.
    """
    places_T, zeros_T = np.arange(longest, dtype=np.int32), np.zeros(longest, np.float32)
    sequence = TokenSequence(places_T % _WORDS, places_T > 0, zeros_T, zeros_T, np.zeros_like(places_T))
    return row_of([sequence] * max(1, tokens_per_microbatch // sequence.num_inputs), share=False)


def idle_row() -> MicroBatch:
    """A row of one token without scored tokens: its gradient is zero, and it keeps ranks in step."""
    ids_T, zeros_T = np.zeros(2, np.int32), np.zeros(2, np.float32)
    known = ("proximal_logprobs", "reference_logprobs", "teacher_logprobs", "values", "value_targets")
    columns = dict.fromkeys(known, zeros_T)
    return row_of([TokenSequence(ids_T, ids_T > 0, zeros_T, zeros_T, ids_T, columns=columns)])


def level(rows: Sequence[MicroBatch], ranks: Ranks) -> Iterator[MicroBatch]:
    """These rows, followed by idle ones until all ranks have as many; ranks compute rows together."""
    # Gathered before the first row: all ranks do the same in the same order.
    lacking = ranks.most(len(rows)) - len(rows)
    return chain(rows, repeat(idle_row(), lacking))


def _int64(array: NDArray[np.generic]) -> Tensor:
    return torch.from_numpy(array.astype(np.int64))


def _float32(array: NDArray[np.generic]) -> Tensor:
    return torch.from_numpy(array.astype(np.float32))
