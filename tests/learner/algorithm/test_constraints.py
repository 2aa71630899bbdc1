"""Multipliers move as the papers say, and what a step learns from is the reward minus the priced costs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from learner.algorithm.algorithm import AlgorithmSettings
from learner.algorithm.constraints import ConstraintSettings, Multiplier, priced, updated
from learner.algorithm.episode import Episode, Values
from learner.algorithm.estimators import GrpoAdvantage
from learner.algorithm.valued import GaeAdvantage

RNG = np.random.default_rng(0)
PRICE = {"risk": Multiplier(0.5), "noise": Multiplier(2.0), "free": Multiplier(0.0)}


def limited(limit: float, **update: Any) -> tuple[ConstraintSettings, ...]:
    return (ConstraintSettings.model_validate({"name": "risk", "limit": limit, "update": update}),)


def followed(constraints: tuple[ConstraintSettings, ...], costs: list[float | None]) -> list[float]:
    now: Any = {}
    values = []
    for cost in costs:
        now = updated(constraints, now, {} if cost is None else {"costs/risk/mean": cost})
        values.append(now["risk"].value)
    return values


def episode(turns: int) -> Episode:
    return Episode(
        rewards_K=RNG.normal(size=turns),
        tokens_K=tuple(int(count) for count in RNG.integers(1, 4, turns)),
        ended=True,
        costs={name: RNG.random(turns) for name in PRICE},
    )


def totals(group: list[Episode], name: str | None = None) -> np.ndarray:
    return np.array([(e.rewards_K if name is None else e.costs[name]).sum() for e in group])


def test_dual_ascent_by_hand() -> None:
    # Above the limit by 2, then 1; below it by 4 (0.75 - 1.0 is not negative), a step that says nothing, above by 0.5.
    found = followed(limited(2.0, kind="dual", rate=0.25), [4.0, 3.0, 1.0, None, 2.5])
    assert found == [0.5, 0.75, 0.5, 0.0, 0.125]


def test_pid_control_by_hand() -> None:
    # kp e + ki I + kd D: e = 2, 1, -3, 1; I = 2, 3, 0, 1; D = 0, 0, 0, 4
    found = followed(limited(2.0, kind="pid", kp=0.5, ki=0.25, kd=0.125), [4.0, 3.0, -1.0 + 0.0, 3.0])
    assert found == [0.5 * 2 + 0.25 * 2, 0.5 + 0.75, 0.0, 0.5 + 0.25 + 0.125 * 4]


def test_a_cost_that_nothing_ever_says_is_refused_in_one_line() -> None:
    with pytest.raises(
        ValueError, match=r"no episode says a cost 'risk' \(costs said: rsk\); let the env"
    ) as told:
        updated(limited(1.0, kind="dual", rate=1.0), {}, {"costs/rsk/mean": 1.0, "rewards/risk/mean": 2.0})
    assert "\n" not in str(told.value)


def test_grpo_compares_rewards_minus_priced_costs() -> None:
    group = [episode(turns) for turns in (1, 3, 2, 2)]
    net = (totals(group) - 0.5 * totals(group, "risk") - 2.0 * totals(group, "noise")) / 3.5
    estimate = GrpoAdvantage(divide=False)
    (found,) = estimate([[priced(each, PRICE) for each in group]])
    for each, value, found_N in zip(group, net - net.mean(), found, strict=True):
        np.testing.assert_allclose(found_N, np.full(sum(each.tokens_K), value), rtol=1e-5)


def test_where_all_earn_the_same_the_cheaper_one_is_better_as_soon_as_costs_have_a_price() -> None:
    group = [
        replace(episode(1), rewards_K=np.ones(1), costs={"risk": np.full(1, cost)}) for cost in (0.0, 4.0)
    ]
    for price, signs in ((0.0, [0, 0]), (0.1, [1, -1])):
        (found,) = GrpoAdvantage()([[priced(each, {"risk": Multiplier(price)}) for each in group]])
        assert [np.sign(values_N[0]) for values_N in found] == signs


def test_a_critic_is_taught_the_priced_reward_turn_by_turn() -> None:
    one = replace(episode(2), tokens_K=(1, 2), values=Values(np.zeros(3, np.float32), 0.0))
    per_turn = (one.rewards_K - 0.5 * one.costs["risk"] - 2.0 * one.costs["noise"]) / 3.5
    estimate = GaeAdvantage(gamma=1.0, lam=1.0, normalize=False)
    ((targets_N,),) = estimate.with_targets([[priced(one, PRICE)]])[1]
    np.testing.assert_allclose(targets_N, [per_turn.sum(), per_turn[1], per_turn[1]], rtol=1e-5)


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        (
            {"constraints": [{"name": "a", "limit": 1, "update": {"kind": "dual", "rate": 1}}] * 2},
            "limit the cost 'a'",
        ),
        (
            {
                "constraints": [{"name": "a", "limit": 1, "update": {"kind": "pid", "ki": 1}}],
                "advantage": {"kind": "gdpo", "weights": {"goal": 1.0}},
            },
            "named rewards alone, which constraints cannot change",
        ),
    ],
)
def test_contradictions_are_refused(recipe: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        AlgorithmSettings.model_validate(recipe)
