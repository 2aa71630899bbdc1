"""Samplers beside plain loops, and how often each group comes first over many draws."""

from __future__ import annotations

import math
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout.buffer.samplers import (
    SMALLEST,
    AnySampler,
    Candidate,
    Fifo,
    OwnSampler,
    Prioritized,
    Uniform,
    spread,
)
from rollout.wire.own_part import OwnPartRefused

DRAWS = 4_000
REWARDS = st.lists(st.floats(-10, 10), max_size=4).map(tuple)
CANDIDATES = st.lists(
    st.builds(Candidate, st.integers(0, 99), st.integers(0, 5), REWARDS),
    max_size=6,
    unique_by=lambda candidate: candidate.group_id,
)


quickly = settings(max_examples=60)


def candidates(*rewards: tuple[float, ...]) -> list[Candidate]:
    return [Candidate(group_id, 0, each) for group_id, each in enumerate(rewards)]


def ids(chosen: list[Candidate]) -> list[int]:
    return [candidate.group_id for candidate in chosen]


def mean_distance(rewards: tuple[float, ...]) -> float:
    if not rewards:
        return 0.0
    mean = math.fsum(rewards) / len(rewards)
    return math.fsum(abs(reward - mean) for reward in rewards) / len(rewards)


@quickly
@given(REWARDS)
def test_spread_is_the_mean_absolute_advantage(rewards: tuple[float, ...]) -> None:
    assert spread(rewards) == pytest.approx(mean_distance(rewards), abs=1e-9)


@quickly
@given(CANDIDATES, st.sampled_from([Fifo(), Uniform(), Prioritized()]), st.integers(0, 2**32))
def test_every_candidate_has_one_place_and_the_same_draws_give_the_same_places(
    found: list[Candidate], sampler: AnySampler, seed: int
) -> None:
    uniform_C = np.random.default_rng(seed).random(len(found))
    ordered = sampler(found, uniform_C)
    assert sorted(ids(ordered)) == sorted(ids(found))
    assert sampler(found, uniform_C) == ordered


@quickly
@given(CANDIDATES, st.integers(0, 2**32))
def test_orders_are_those_of_plain_loops(found: list[Candidate], seed: int) -> None:
    uniform_C = np.random.default_rng(seed).random(len(found))
    assert ids(Fifo()(found, uniform_C)) == [
        g for _, g in sorted((c.taken_version, c.group_id) for c in found)
    ]
    by_draw = sorted(zip(uniform_C.tolist(), ids(found), strict=True))
    assert ids(Uniform()(found, uniform_C)) == [group_id for _, group_id in by_draw]
    times = []
    for candidate, u in zip(found, uniform_C.tolist(), strict=True):
        rate = (mean_distance(candidate.rewards) + SMALLEST) ** 0.7
        times.append((-math.log(1 - u) / rate, candidate.group_id))
    ordered = [dict((g, t) for t, g in times)[g] for g in ids(Prioritized(exponent=0.7)(found, uniform_C))]
    assert ordered == sorted(ordered) or ordered == pytest.approx(sorted(ordered), rel=1e-6)


def test_no_exponent_is_uniform() -> None:
    found = candidates((0.0, 1.0), (0.0, 0.0), (5.0, -5.0), ())
    for seed in range(50):
        uniform_C = np.random.default_rng(seed).random(len(found))
        assert Prioritized(exponent=0)(found, uniform_C) == Uniform()(found, uniform_C)


def first_two(weights: list[float], first: int, second: int) -> float:
    """Probability that these are drawn first and second, in proportion to their weights, without replacement."""
    rest = sum(weights) - weights[first]
    return weights[first] / sum(weights) * weights[second] / rest


@pytest.mark.parametrize("exponent", [0.0, 0.6, 1.0])
def test_groups_are_drawn_in_proportion_to_their_priority_one_after_another(exponent: float) -> None:
    rewards = [(0.0, 1.0), (0.0, 0.2), (3.0, 0.0), (0.5, 0.0, 0.5)]
    found, sampler = candidates(*rewards), Prioritized(exponent=exponent)
    seen = dict.fromkeys(permutations(range(4), 2), 0)
    rng = np.random.default_rng(3)
    for uniform_C in rng.random((DRAWS, len(found))):
        first, second, *_ = ids(sampler(found, uniform_C))
        seen[first, second] += 1
    weights = [(mean_distance(each) + SMALLEST) ** exponent for each in rewards]
    for (first, second), count in seen.items():
        chance = first_two(weights, first, second)
        assert abs(count - DRAWS * chance) < 4 * math.sqrt(DRAWS * chance * (1 - chance))


def test_uniform_has_every_order_as_often() -> None:
    found = candidates((0.0, 9.0), (0.0, 0.0), (1.0, 1.0))
    seen = dict.fromkeys(permutations(range(3)), 0)
    for uniform_C in np.random.default_rng(4).random((DRAWS, 3)):
        seen[tuple(ids(Uniform()(found, uniform_C)))] += 1
    assert all(abs(count - DRAWS / 6) < 4 * math.sqrt(DRAWS * 5 / 36) for count in seen.values())


def test_a_group_whose_episodes_all_earned_the_same_comes_last_but_comes() -> None:
    found, sampler = candidates((1.0, 1.0), (0.0, 1.0)), Prioritized(exponent=0.2)
    draws = np.random.default_rng(5).random((2000, 2))
    first = [ids(sampler(found, uniform_C))[0] for uniform_C in draws]
    assert 0 < first.count(0) < first.count(1)


def test_an_own_sampler_orders_the_candidates_and_may_not_bring_others() -> None:
    found = candidates((1.0,), (0.0,), (0.5,))
    uniform_C = np.zeros(3)
    assert ids(OwnSampler(kind="tests.own_parts:newest_first")(found, uniform_C)) == [2, 1, 0]
    with pytest.raises(OwnPartRefused, match="each at most once"):
        OwnSampler(kind="tests.own_parts:twice")(found, uniform_C)
