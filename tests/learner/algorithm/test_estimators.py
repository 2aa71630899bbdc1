from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from learner.algorithm.advantages import overlong_penalty
from learner.algorithm.algorithm import AnyEstimator
from learner.algorithm.estimators import Episode, Values, sides
from learner.algorithm.regularizers import OverlongSettings
from learner.algorithm.valued import GaeAdvantage
from learner.data.prepare import Example
from rollout.wire.trajectory import EndReason
from tests import reference
from tests.learner.episodes import any_groups, paid, random_groups, trajectory

# Powers of two and quarters keep every sum exact, so that what is equal on paper is equal in floats.
SECTIONS: list[dict[str, Any]] = [
    {"kind": "grpo", "divide": True, "eps": 1e-6},
    {"kind": "grpo", "divide": False, "eps": 1e-6},
    {"kind": "rloo"},
    {"kind": "maxrl", "eps": 1e-6},
    {"kind": "returns", "gamma": 0.5, "baseline": "none"},
    {"kind": "returns", "gamma": 0.75, "baseline": "group"},
    {"kind": "returns", "gamma": 0.5, "baseline": "turn"},
    {"kind": "grpo", "divide": True, "deviation": "sample", "eps": 1e-6},
    {"kind": "gigpo", "gamma": 0.75, "weight": 0.5, "divide": True, "deviation": "sample", "eps": 1e-6},
    {"kind": "gigpo", "gamma": 0.5, "weight": 1.0, "divide": False, "eps": 1e-6},
    {"kind": "returns", "gamma": 0.75, "baseline": "batch"},
    {"kind": "reinforce_pp", "gamma": 1.0, "group_baseline": False},
    {"kind": "reinforce_pp", "gamma": 0.5, "group_baseline": False},
    {"kind": "reinforce_pp", "gamma": 1.0, "group_baseline": True},
    {"kind": "gdpo", "weights": {"goal": 1.0, "form": 0.5}, "eps": 1e-6},
    {"kind": "gdpo", "weights": {"goal": 1.0, "form": 0.5}, "deviation": "sample", "eps": 1e-6},
    {"kind": "gae", "gamma": 0.75, "lam": 0.5, "normalize": False},
    {"kind": "gae", "gamma": 1.0, "lam": 1.0, "normalize": True},
]
WITHIN_GROUPS = SECTIONS[:10]
quickly = settings(max_examples=25)


def _name(section: object) -> str | None:
    return "-".join(map(str, section.values())) if isinstance(section, dict) else None


def _seen(story: reference.Episode, critic: bool = False) -> Episode:
    """What an estimator sees of an episode."""
    extra_N = np.array(story.extra, np.float32) if story.extra else None
    values = Values(np.array(story.values, np.float32), story.after) if critic else None
    return replace(Episode.of(trajectory(story)), token_rewards_N=extra_N, values=values)


def _advantages(section: dict[str, Any], stories: list[list[reference.Episode]]) -> list[list[np.ndarray]]:
    estimator = TypeAdapter(AnyEstimator).validate_python(section)
    return estimator([[_seen(story, estimator.critic) for story in group] for group in stories])


def _told(rewards: list[list[float]], **known: Any) -> reference.Episode:
    """One sampled token for each number, one list of numbers for each turn; a turn is paid the sum of its list."""
    tokens: list[reference.Token] = []
    for turn, numbers in enumerate(rewards):
        tokens += [reference.Token(7, False, turn, 0), *(reference.Token(8, True, turn, 0) for _ in numbers)]
    states = tuple(f"state {turn}" for turn in range(len(rewards)))
    return reference.Episode(
        tuple(tokens), tuple(map(sum, rewards)), **{"states": states, "named": {}, **known}
    )


# (section, rewards of four siblings of one token, advantages): by hand. Mean 1, variance (1 + 1 + 1 + 9) / 4 = 3.
SIBLINGS = [
    ({"kind": "grpo", "eps": 0.5}, [0, 0, 0, 4], np.array([-1, -1, -1, 3]) / (3**0.5 + 0.5)),
    ({"kind": "grpo", "divide": False}, [0, 0, 0, 4], [-1, -1, -1, 3]),
    # The sample's variance is (1 + 1 + 1 + 9) / 3 = 4.
    ({"kind": "grpo", "deviation": "sample", "eps": 0.0}, [0, 0, 0, 4], [-0.5, -0.5, -0.5, 1.5]),
    ({"kind": "grpo", "deviation": "sample", "eps": 0.0}, [1, 0], [0.5**0.5, -(0.5**0.5)]),
    ({"kind": "grpo", "eps": 0.0}, [1, 0], [1, -1]),
    ({"kind": "rloo"}, [0, 0, 0, 4], [-4 / 3, -4 / 3, -4 / 3, 4]),
    ({"kind": "maxrl", "eps": 0.0}, [0, 0, 0, 4], [-1, -1, -1, 3]),
    ({"kind": "maxrl", "eps": 0.0}, [0, 1, 1, 0], [-1, 1, 1, -1]),
    ({"kind": "maxrl"}, [0, 0, 0, 0], [0, 0, 0, 0]),
    ({"kind": "maxrl"}, [-4, 0, 0, 1], [0, 0, 0, 0]),
    ({"kind": "reinforce_pp"}, [0, 0, 0, 4], np.array([-1, -1, -1, 3]) / 3**0.5),
    ({"kind": "returns", "baseline": "none"}, [0, 0, 0, 4], [0, 0, 0, 4]),
    ({"kind": "reinforce_pp", "group_baseline": True}, [0, 0, 0, 4], np.array([-1, -1, -1, 3]) / 3**0.5),
    ({"kind": "returns", "baseline": "group"}, [0, 0, 0, 4], np.array([-1, -1, -1, 3]) / 3**0.5),
    ({"kind": "returns", "baseline": "turn"}, [0, 0, 0, 4], np.array([-1, -1, -1, 3]) / 3**0.5),
    # All began in the same state: the comparison of turns is that of episodes once more.
    ({"kind": "gigpo", "divide": False, "weight": 0.5}, [0, 0, 0, 4], [-1.5, -1.5, -1.5, 4.5]),
]


@pytest.mark.parametrize(("section", "rewards", "expected"), SIBLINGS, ids=_name)
def test_siblings_of_one_token_equal_the_hand_computed_table(
    section: dict[str, Any], rewards: list[float], expected: list[float]
) -> None:
    (found,) = _advantages(section, [[_told([[reward]]) for reward in rewards]])
    assert all(array.dtype == np.float32 for array in found)
    np.testing.assert_allclose(np.concatenate(found), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("section", SECTIONS, ids=_name)
def test_what_an_estimator_says_of_itself_holds(section: dict[str, Any]) -> None:
    estimator = TypeAdapter(AnyEstimator).validate_python(section)

    def nothing(*groups: list[list[float]]) -> bool:
        """No advantage for anybody, of rewards of turns; a group that is too small to compare is refused instead."""
        stories = [
            [
                _told(
                    [[reward] for reward in rewards],
                    states=("a",) * len(rewards),
                    named={"goal": rewards[0], "form": rewards[-1]},
                    values=(0.0,) * len(rewards) if estimator.critic else (),
                )
                for rewards in group
            ]
            for group in groups
        ]
        try:
            return not any(one_N.any() for group in _advantages(section, stories) for one_N in group)
        except ValueError:
            return True

    # The same in all, earned in another turn: only who reads totals alone has nothing to say.
    assert nothing([[1, 0], [0, 1]]) == estimator.totals
    # One failed, one solved, each alone with its task: only who compares siblings has nothing to say.
    assert nothing([[0]], [[1]]) == estimator.siblings


def test_the_group_baseline_of_reinforce_pp_is_that_of_whole_episodes() -> None:
    # R - mean at every token, as in the paper: [0, 0, 0 / 0, 0, 0 / -0.5 / 0.5]. The first group is solved by both, in
    # its first turn: no token that follows is worse for that. Eight tokens of mean 0 and variance 0.5 / 8 = 1 / 16.
    solved = [_told([[1], [0], [0]]), _told([[1], [0], [0]])]
    stories = [solved, [_told([[0]]), _told([[1]])]]
    found = _advantages({"kind": "reinforce_pp", "group_baseline": True}, stories)
    np.testing.assert_allclose(np.concatenate([*found[0], *found[1]]), [0, 0, 0, 0, 0, 0, -2, 2], rtol=1e-5)


def test_returns_are_compared_turn_by_turn_as_by_hand() -> None:
    # Returns [3, 1], [1, 1] and [2]: means 2 and 1. Less these: [1, 0], [-1, 0] and [0], of variance 2 / 5.
    stories = [_told([[2], [1]]), _told([[0], [1]]), _told([[2]])]
    (found,) = _advantages({"kind": "returns", "baseline": "turn"}, [stories])
    np.testing.assert_allclose(np.concatenate(found), np.array([1, 0, -1, 0, 0]) / 0.4**0.5, rtol=1e-5)
    # A turn that one alone has reached is compared with nothing, however much follows it.
    (found,) = _advantages({"kind": "returns", "baseline": "turn"}, [[_told([[0], [4]]), _told([[0]])]])
    np.testing.assert_allclose(np.concatenate(found), np.array([2, 0, -2]) / (8 / 3) ** 0.5, rtol=1e-5)


@pytest.mark.parametrize("section", SECTIONS, ids=_name)
@pytest.mark.parametrize("scale", [1.0, 1234567.0, 1e-6])
def test_the_same_total_in_parts_of_other_sizes_has_no_advantage(
    section: dict[str, Any], scale: float
) -> None:
    # In one turn, so that estimators that read turns find the same in each.
    ways = [(0.1, 0.2, 0.7), (0.3, 0.3, 0.4), (0.6, 0.1, 0.3), (1.1, -0.2, 0.1)]
    stories = []
    for way in ways:
        parts = [float(np.float32(scale * part)) for part in way]
        named = {"goal": sum(parts), "form": sum(reversed(parts))}
        values = (sum(parts),) if section["kind"] == "gae" else ()
        stories.append(_told([[sum(parts)]], states=("a",), named=named, values=values))
    assert len({story.paid for story in stories}) > 1, "they differ in floats"
    if section.get("baseline") == "none" or section.get("normalize") is False:
        return  # it compares nothing
    for found in _advantages(section, [stories, stories]):
        assert not any(array.any() for array in found)


def test_parts_that_are_taken_back_are_known_no_better_than_they_were_paid() -> None:
    # 0.1 + 0.2 - 0.3 is 3e-9 in float32, beside a 0 that is exact.
    stories = [_told([[0.1, 0.2, -0.3]], named={}), _told([[0.0]])]
    for kind in ("grpo", "rloo", "maxrl"):
        parts = [
            replace(_seen(stories[0]), rewards_K=np.float32([0.1, 0.2, -0.3]).astype(float)),
            _seen(stories[1]),
        ]
        (found,) = TypeAdapter(AnyEstimator).validate_python({"kind": kind})([parts])
        assert not any(array.any() for array in found)


@pytest.mark.parametrize(
    "section",
    [
        {"kind": "reinforce_pp"},
        {"kind": "reinforce_pp", "group_baseline": True},
        {"kind": "returns", "baseline": "batch"},
        {"kind": "gae"},
    ],
    ids=_name,
)
def test_costs_of_nothing_are_no_advantage_of_a_batch(section: dict[str, Any]) -> None:
    # The floor of the deviation is 1e-4: costs of 1e-9 are advantages of about 1e-5, and not of about 1.
    values = (0.0,) if section["kind"] == "gae" else ()
    stories = [[_told([[0.0]], extra=(-cost,), values=values) for cost in (1e-9, 0.0, 3e-9, 2e-9)]]
    found = np.concatenate(_advantages(section, stories)[0])
    np.testing.assert_allclose(found, np.array([0.5, 1.5, -1.5, -0.5]) * 1e-5, rtol=1e-3)


def test_returns_of_turns_equal_the_hand_computed_ones() -> None:
    story = _told([[1, 0], [2], [0, 4, 0]])
    section = {"kind": "returns", "gamma": 0.5, "baseline": "none"}
    assert _advantages(section, [[story]])[0][0].tolist() == [3, 3, 4, 4, 4, 4]


def test_turns_of_one_state_are_compared_as_by_hand() -> None:
    # Returns at gamma 1/2: [1, 2] and [3, 2]. Means: state a 2 (1 and 3), state b 2 (one turn), state c 2 (one turn).
    one = _told([[0], [2]], states=("a", "b"))
    other = _told([[2], [2]], states=("a", "c"))
    section = {"kind": "gigpo", "gamma": 0.5, "weight": 10.0, "divide": False}
    (found,) = _advantages(section, [[one, other]])
    # Episodes: rewards 2 and 4, mean 3.
    assert [array.tolist() for array in found] == [[-1 - 10, -1], [1 + 10, 1]]


@pytest.mark.parametrize(
    ("ended", "advantages", "targets"), [(True, [0.5, 2.0], [1.5, 4.0]), (False, [1.5, 6.0], [2.5, 8.0])]
)
def test_gae_equals_the_hand_computed_case(
    ended: bool, advantages: list[float], targets: list[float]
) -> None:
    # gamma = lambda = 1/2, V = [1, 2] and then 8. Deltas: 0 + 1 - 1, then 4 - 2 where it ended and 4 + 4 - 2 where not.
    story = _told([[0], [4]], values=(1.0, 2.0), after=8.0, ended=ended)
    found = GaeAdvantage(gamma=0.5, lam=0.5).estimate(_seen(story, critic=True))
    assert [array.tolist() for array in found] == [advantages, targets]


def test_named_rewards_are_normalized_apart() -> None:
    # Apart both rewards give -1 and 1; weighted 3 to 1 the four episodes stand at -2, 2, -4, 4, whatever the scales.
    named = [({"a": 0, "b": 1000}, {"a": 1, "b": 0}), ({"a": 0, "b": 0}, {"a": 1, "b": 1000})]
    stories = [[_told([[0.0]], named=rewards) for rewards in pair] for pair in named]
    found = _advantages({"kind": "gdpo", "weights": {"a": 3, "b": 1}, "eps": 0}, stories)
    np.testing.assert_allclose(
        np.concatenate([*found[0], *found[1]]), np.array([-2, 2, -4, 4]) / 10**0.5, rtol=1e-6
    )


@pytest.mark.parametrize("section", SECTIONS, ids=_name)
@given(stories=any_groups(), costly=st.booleans())
@quickly
def test_advantages_are_those_of_the_papers_formulas(
    section: dict[str, Any], stories: list[list[reference.Episode]], costly: bool
) -> None:
    if costly:
        stories = [[paid(story) for story in group] for group in stories]
    for found, expected in zip(
        _advantages(section, stories), reference.advantages(section, stories), strict=True
    ):
        for got, numbers in zip(found, expected, strict=True):
            np.testing.assert_allclose(got, numbers, rtol=1e-4, atol=1e-5)


@given(stories=any_groups())
@quickly
def test_the_critics_targets_are_advantages_plus_values(stories: list[list[reference.Episode]]) -> None:
    for story in stories[0]:
        _, targets_N = GaeAdvantage(gamma=0.75, lam=0.5, normalize=True).estimate(_seen(story, critic=True))
        np.testing.assert_allclose(targets_N, reference.gae_of(story, 0.75, 0.5)[1], atol=1e-6)


@pytest.mark.parametrize("section", WITHIN_GROUPS, ids=_name)
@given(stories=any_groups(), order=st.randoms(use_true_random=False))
@quickly
def test_a_group_knows_nothing_of_the_others(
    section: dict[str, Any], stories: list[list[reference.Episode]], order: Any
) -> None:
    alone = [_advantages(section, [group])[0] for group in stories]
    places = list(range(len(stories)))
    order.shuffle(places)
    together = _advantages(section, [stories[place] for place in places])
    for place, group in zip(places, together, strict=True):
        for got, own in zip(group, alone[place], strict=True):
            np.testing.assert_array_equal(got, own)


@pytest.mark.parametrize("section", SECTIONS[10:], ids=_name)
def test_over_the_batch_the_order_of_groups_moves_nothing(section: dict[str, Any]) -> None:
    stories = random_groups(3, groups=4)
    ahead, back = _advantages(section, stories), _advantages(section, stories[::-1])[::-1]
    for pair in zip(ahead, back, strict=True):
        for one, other in zip(*pair, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-6)


@pytest.mark.parametrize(
    ("reason", "ended"),
    [
        (EndReason.TERMINATED, True),
        (EndReason.MALFORMED, True),
        (EndReason.TRUNCATED, False),
        (EndReason.CONTEXT_OVERFLOW, False),
    ],
)
def test_only_a_final_state_ends_an_episode(reason: EndReason, ended: bool) -> None:
    assert Episode.of(replace(trajectory(_told([[1.0]])), end_reason=reason)).ended == ended


@pytest.mark.parametrize(
    ("length", "penalty"), [(0, 0), (80, 0), (85, -0.25), (90, -0.5), (100, -1), (500, -1)]
)
def test_length_is_punished_as_in_the_paper(length: int, penalty: float) -> None:
    assert overlong_penalty(length, 100, 20) == pytest.approx(penalty)
    assert reference.overlong(length, 100, 20) == pytest.approx(penalty)


def test_the_punishment_of_length_is_paid_in_the_last_turn() -> None:
    story = _told([[1.0, 0.0], [0.5, 0.0, 0.0]])
    example = Example.of(trajectory(story), OverlongSettings(tokens=6, margin=4, weight=2.0))
    assert example.episode.rewards_K.tolist() == [1.0, 0.5 + 2.0 * reference.overlong(5, 6, 4)]


def test_a_named_reward_that_an_episode_lacks_counts_zero() -> None:
    # The second was cut off before its environment named any: it is worth less than the third, as one that failed.
    named: list[dict[str, float]] = [{"goal": 1.0}, {}, {"goal": 0.0}]
    stories = [[_told([[0.0]], named=rewards) for rewards in named]]
    (found,) = _advantages({"kind": "gdpo", "weights": {"goal": 1}}, stories)
    np.testing.assert_allclose(np.concatenate(found), np.array([2, -1, -1]) / 2**0.5, rtol=1e-5)


@pytest.mark.parametrize(
    "section",
    [{"kind": "grpo"}, {"kind": "maxrl"}, {"kind": "gigpo"}, {"kind": "returns", "baseline": "group"}],
    ids=_name,
)
def test_what_tokens_cost_is_no_advantage_where_the_task_paid_the_same(section: dict[str, Any]) -> None:
    stories = [_told([[1.0]], extra=(-cost,)) for cost in (1e-5, 0.0, 2e-5)]
    assert not any(array.any() for array in _advantages(section, [stories])[0])
    others = [_told([[reward]], extra=(-1e-5,)) for reward in (1.0, 0.0, 0.0)]
    assert all(array.any() for array in _advantages(section, [others])[0])


def test_costs_that_nothing_divides_stay_as_small_as_they_are() -> None:
    stories = [_told([[1.0]], extra=(-cost,)) for cost in (1e-5, 0.0, 2e-5)]
    (found,) = _advantages({"kind": "grpo", "divide": False}, [stories])
    np.testing.assert_allclose(np.concatenate(found), [0, 1e-5, -1e-5], atol=1e-7)


def test_what_an_estimator_lacks_is_said_in_one_line() -> None:
    with pytest.raises(
        ValueError, match=r"^advantage.weights names the reward 'goal'[^\n]*have: form[^\n]*$"
    ):
        _advantages({"kind": "gdpo", "weights": {"goal": 1}}, [[_told([[1]], named={"form": 1.0})] * 2])
    with pytest.raises(ValueError, match=r"^advantage.kind='gae' needs the critic's values[^\n]*$"):
        GaeAdvantage()([[_seen(_told([[1.0]]))]])


def test_what_is_good_for_one_side_is_bad_for_the_other() -> None:
    assert sides([0, 1, 0]) == (1, -1, 1)
    assert sides([None, 0, None, None, 1, None]) == (1, 1, -1, -1, -1, 0), "a thought is the next move's"
    assert sides([None, None]) == ()
    episode = replace(_seen(_told([[1, 0], [2], [0, 4, 0]])), sides_K=(1, -1, 1))
    assert episode.sides_N.tolist() == [1, 1, -1, 1, 1, 1]
    assert _seen(_told([[1, 0], [2]])).sides_N.tolist() == [1, 1, 1]


@pytest.mark.parametrize("section", SECTIONS[:3], ids=_name)
def test_the_second_sides_advantage_is_that_of_its_own_rewards(section: dict[str, Any]) -> None:
    won = [1.0, 0.0, 0.0, 0.5]
    firsts, seconds = (
        _advantages(section, [[_told([[r]]) for r in of]])[0] for of in (won, [1 - r for r in won])
    )
    np.testing.assert_allclose(-np.concatenate(firsts), np.concatenate(seconds), rtol=1e-6)
