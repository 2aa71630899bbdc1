from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from learner.data.batch import NOT_SAMPLED, Batch, TokenSequence, pack, sequences_of
from rollout.wire.trajectory import Group


def _sequence(length: int, sampled: list[int], base: int = 0, advantage: float = 1.0) -> TokenSequence:
    mask = np.zeros(length, bool)
    mask[sampled] = True
    return TokenSequence(
        token_ids_T=np.arange(base, base + length, dtype=np.int32),
        sampled_T=mask,
        behavior_logprobs_T=np.where(mask, -np.arange(length), 0).astype(np.float32),
        advantages_T=np.where(mask, advantage, 0).astype(np.float32),
        versions_T=np.where(mask, base, NOT_SAMPLED).astype(np.int32),
    )


def test_a_row_equals_the_hand_packed_one() -> None:
    batch = pack([_sequence(3, [2], base=10), _sequence(4, [1, 3], base=20)], 100, 100)
    (row,) = batch.micro_batches
    # The last token of each sequence is a target only; longer sequences stand first.
    assert row.input_ids_T.tolist() == [20, 21, 22, 10, 11]
    assert row.position_ids_T.tolist() == [0, 1, 2, 0, 1]
    assert row.tree.segments_S3.tolist() == [[0, 3, 3], [3, 5, 5]]
    assert row.score_index_M.tolist() == [0, 2, 4]
    assert row.targets_M.tolist() == [21, 23, 12]
    assert row.expand_N.tolist() == [0, 1, 2]
    assert row.behavior_logprobs_N.tolist() == [-1.0, -3.0, -2.0]
    assert row.versions_N.tolist() == [20, 20, 10]
    assert row.sequence_N.tolist() == [0, 0, 1]
    assert batch.sampled_tokens == 3


def test_segments_of_an_episode_become_sequences(group_of: Callable[..., Group]) -> None:
    episode = group_of(0, [1.0, 0.0], turns=3).trajectories[0]
    steps = tuple(replace(step, segment=0 if step.turn < 2 else 1) for step in episode.turns)
    count = episode.num_sampled
    columns = {"values": np.arange(count, dtype=np.float32)}
    first, second = sequences_of(
        replace(episode, turns=steps), np.full(count, 0.5, np.float32), 0.25, columns
    )
    ids = [np.concatenate([s.prompt_ids, s.action_ids]) for s in steps]
    np.testing.assert_array_equal(first.token_ids_T, np.concatenate(ids[:2]))
    np.testing.assert_array_equal(second.token_ids_T, ids[2])
    sampled = np.concatenate([s.action_ids for s in steps[:2]])
    np.testing.assert_array_equal(first.token_ids_T[first.sampled_T], sampled)
    logprobs = np.concatenate([s.behavior_logprobs for s in steps[:2]])
    np.testing.assert_array_equal(first.behavior_logprobs_T[first.sampled_T], logprobs)
    assert set(first.advantages_T[first.sampled_T]) == {0.5}
    assert not first.advantages_T[~first.sampled_T].any()
    assert (first.versions_T[~first.sampled_T] == NOT_SAMPLED).all()
    both = [s.columns["values"][s.sampled_T] for s in (first, second)]
    np.testing.assert_array_equal(np.concatenate(both), columns["values"])
    assert (first.weight, second.weight) == (0.25, 0.25)


@given(st.lists(st.integers(2, 40), min_size=1, max_size=30), st.integers(10, 80))
def test_packing_loses_nothing_and_pads_nothing(lengths: list[int], limit: int) -> None:
    sequences = [_sequence(length, [length - 1], base=100 * i) for i, length in enumerate(lengths)]
    batch = pack(sequences, limit, 40)
    rows = batch.micro_batches
    assert sum(len(row.input_ids_T) for row in rows) == sum(length - 1 for length in lengths)
    assert all(len(row.input_ids_T) <= limit or len(row.tree.paths_B) == 1 for row in rows)
    assert sorted(t for row in rows for t in row.targets_M.tolist()) == [
        100 * i + length - 1 for i, length in enumerate(lengths)
    ]
    for row in rows:
        diffs = [stop - start for start, stop, _ in row.tree.segments_S3.tolist()]
        assert diffs == sorted(diffs, reverse=True)
    # First-fit-decreasing: at most one row is half empty or worse.
    assert sum(2 * len(row.input_ids_T) < limit for row in rows) <= 1


def test_skipped_sequences_still_count_in_the_denominator() -> None:
    sequences = [_sequence(5, [2, 3, 4], advantage=0.0), _sequence(4, [3], base=50)]
    batch: Batch = pack(sequences, 100, 100, skip_zero_advantage=True)
    assert (batch.sampled_tokens, batch.sequences, batch.skipped_sequences) == (4, 2, 1)
    assert [row.targets_M.tolist() for row in batch.micro_batches] == [[53]]


def test_a_sequence_beyond_the_context_is_refused_in_one_line() -> None:
    with pytest.raises(ValueError, match=r"^a sequence of 6 tokens exceeds the model's context of 5[^\n]*$"):
        pack([_sequence(6, [5])], 100, 5)


def test_a_segment_without_a_prompt_is_refused(group_of: Callable[..., Group]) -> None:
    episode = group_of(0, [1.0, 0.0], turns=1).trajectories[0]
    bare = replace(episode, turns=(replace(episode.turns[0], prompt_ids=np.zeros(0, np.int32)),))
    with pytest.raises(ValueError, match="begins with a sampled token"):
        sequences_of(bare, np.ones(bare.num_sampled, np.float32))
