"""How a step's groups are dealt out to the ranks of a learner."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout.buffer.replay_store import ReplayStore
from rollout.wire.partition import Partition, StepTorn, deal, work
from rollout.wire.schema import decode, encode
from rollout.wire.trajectory import EndReason, Group, Slot, Task, Trajectory, Turn
from tests.rollout.buffer.stores import commit, group_ids, reserve

SIZES = st.lists(st.integers(1, 50), min_size=1, max_size=7)


@given(SIZES, st.integers(1, 4))
def test_every_item_is_dealt_once_and_nobody_goes_without_while_there_are_enough(
    sizes: list[int], ranks: int
) -> None:
    shares = deal(sizes, ranks)
    assert sorted(place for share in shares for place in share) == list(range(len(sizes)))
    assert all(shares) or len(sizes) < ranks
    assert all(share == sorted(share) for share in shares)


@given(SIZES, st.integers(1, 3))
def test_the_fullest_share_is_within_a_third_of_the_best_there_is(sizes: list[int], ranks: int) -> None:
    def fullest(rank_of: tuple[int, ...]) -> int:
        return max(
            sum(size for size, rank in zip(sizes, rank_of, strict=True) if rank == r) for r in range(ranks)
        )

    best = min(fullest(rank_of) for rank_of in product(range(ranks), repeat=len(sizes)))
    assert max(sum(sizes[place] for place in share) for share in deal(sizes, ranks)) <= best * 4 / 3 + 1e-9


@given(st.lists(st.lists(st.integers(0, 2), max_size=5), max_size=8))
def test_the_work_of_short_texts_is_the_number_of_their_different_prefixes(texts: list[list[int]]) -> None:
    prefixes = {tuple(text[:stop]) for text in texts for stop in range(1, len(text) + 1)}
    assert int(work([np.array(text, np.int32) for text in texts])) == len(prefixes)


def test_a_token_as_deep_as_six_times_the_width_counts_twice() -> None:
    long_T = np.random.default_rng(0).integers(0, 9, 24_577).astype(np.int32)
    assert work([long_T]) - work([long_T[:-1]]) == pytest.approx(3)  # at depth 2 x 12,288
    assert work([long_T] * 8) == work([long_T])


def test_siblings_weigh_what_they_do_not_share_whichever_turn_brought_it() -> None:
    def turn(number: int, segment: int, prompt: list[int], action: list[int]) -> Turn:
        return replace(
            _group(0, 0, len(action)).trajectories[0].turns[0],
            turn=number,
            segment=segment,
            prompt_ids=np.array(prompt, np.int32),
            action_ids=np.array(action, np.int32),
        )

    def group(group_id: int, *episodes: list[Turn]) -> Group:
        base = _group(group_id, 1, 1)
        played = [
            replace(base.trajectories[0], index=at, turns=tuple(turns)) for at, turns in enumerate(episodes)
        ]
        return replace(base, trajectories=tuple(played))

    prompt = list(range(10, 20))
    alike = [turn(0, 0, prompt, [1]), turn(1, 0, prompt, [2])]
    shared = group(
        0, alike, alike, [turn(0, 0, prompt, [1]), turn(1, 1, prompt, [2])]
    )  # 22 and one more: 23 of 66
    lone = group(1, [turn(0, 0, list(range(30)), [1])])  # 31 tokens
    small = group(2, [turn(0, 0, [5, 6, 7], [1, 2])])  # 5
    batches = [encode(each) for each in (shared, lone, small)]
    held = [[decode(each).slot.group_id for each in Partition(rank, 2).of(batches)] for rank in (0, 1)]
    assert held == [[1], [0, 2]]


def _group(group_id: int, prompt: int, action: int) -> Group:
    step = Turn(
        turn=0,
        segment=0,
        observation="o" * 1000,
        action="",
        prompt_ids=np.zeros(prompt, np.int32),
        action_ids=np.zeros(action, np.int32),
        behavior_logprobs=np.zeros(action, np.float32),
        versions=np.zeros(action, np.int32),
        reward=0.0,
        finish_reason="stop",
    )
    task = Task.of("toy", 0)
    return Group(
        Slot(group_id, 0, task, 0), (Trajectory(group_id, 0, 0, task, (step,), EndReason.TERMINATED),)
    )


def test_ranks_get_groups_of_about_as_many_tokens_prompts_and_answers_in_order_of_group_id() -> None:
    batches = [encode(_group(at, *size)) for at, size in enumerate([(2, 1), (1, 5), (2, 2), (0, 2)])]

    def held(rank: int) -> list[int]:
        return [decode(batch).slot.group_id for batch in Partition(rank, 2).of(batches)]

    assert (held(0), held(1)) == ([1, 3], [0, 2])
    assert [decode(batch).slot.group_id for batch in Partition().of(batches)] == [0, 1, 2, 3]


def test_every_rank_gets_its_share_of_one_step_however_often_it_asks(
    open_store: Callable[..., ReplayStore], group_of: Callable[..., Group]
) -> None:
    store = open_store(groups_per_step=4, max_lag=0)
    for tokens in (9, 1, 5, 6):
        commit(store, group_of(reserve(store), tokens=tokens))
    shares = [group_ids(store.take(0, Partition(rank, 2))) for rank in (0, 1)]
    assert shares == [[0, 1], [2, 3]]
    store = open_store(groups_per_step=4, max_lag=0)  # killed
    assert [group_ids(store.take(0, Partition(rank, 2))) for rank in (1, 0, 1)] == [
        shares[1],
        shares[0],
        shares[1],
    ]
    assert store.counts()["taken"] == 4
    store.close()


def test_a_step_whose_rows_are_lost_after_some_rank_has_its_share_is_no_step(
    open_store: Callable[..., ReplayStore], group_of: Callable[..., Group], tmp_path: Path
) -> None:
    store = open_store(max_lag=0)
    for _ in range(2):
        commit(store, group_of(reserve(store)))
    assert group_ids(store.take(0, Partition(0, 2))) == [0]
    store = open_store(max_lag=0)  # killed, and what it had in memory with it
    (segment,) = (tmp_path / "groups").glob("*.arrows")
    content = bytearray(segment.read_bytes())
    content[-40] ^= 1
    segment.write_bytes(content)
    with pytest.raises(StepTorn, match="rows of the step after version 0 are lost"):
        store.take(0, Partition(1, 2))
    store.rollback(0)
    assert store.take(0, Partition(0, 2)) is None
    assert [store.reserve("w", worker_loop) for worker_loop in (90, 91)].count(None) == 0
    store.close()
