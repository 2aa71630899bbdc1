"""A user's own loss, estimator, correction and regularizer train as Manta's parts of the same formulas do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from learner.algorithm.algorithm import AlgorithmSettings
from learner.algorithm.schedule import OptimSettings
from learner.settings import LearnerSettings, ModelSettings
from learner.training.learner import Learner
from rollout.wire.own_part import OwnPartRefused
from rollout.wire.trajectory import Group

Groups = Callable[..., Group]
Recipe = dict[str, Any]
EVERY = {"skip_zero_advantage": False}
GAE = {"kind": "gae", "gamma": 1.0, "lam": 1.0, "normalize": False}
CRITIC = {"kind": "own", "optim": {"learning_rate": 1e-2}}
UNCAPPED = {"coefficient": 0.3, "estimator": "k2"}
CORRECTED = {"proximal": "learner", "loss": {"kind": "reinforce"}}

PAIRS: dict[str, tuple[Recipe, Recipe]] = {
    "loss": (
        {"loss": {"kind": "tests.own_parts:ppo", "low": 0.2, "high": 0.28}, "minibatches": 2},
        {"loss": {"kind": "ppo"}, "minibatches": 2},
    ),
    "estimator": ({"advantage": "tests.own_parts:leave_one_out"}, {"advantage": {"kind": "rloo"}}),
    "estimator with a critic": (
        {"advantage": {"kind": "tests.own_parts:monte_carlo"}, "critic": CRITIC},
        {"advantage": GAE, "critic": CRITIC},
    ),
    "correction": (
        CORRECTED | {"corrections": [{"kind": "tests.own_parts:capped", "cap": 1.1}]},
        CORRECTED | {"corrections": [{"kind": "tis", "cap": 1.1}]},
    ),
    "regularizer": (
        EVERY | {"regularizers": [{"kind": "tests.own_parts:half_square", "reference": True, "weight": 0.3}]},
        EVERY | {"kl": UNCAPPED},
    ),
}


def trained(tiny: Path, recipe: Recipe, groups: list[Group]) -> tuple[Learner, list[dict[str, float]]]:
    settings = LearnerSettings(
        model=ModelSettings(path=str(tiny)),
        optim=OptimSettings(learning_rate=3e-3),
        algorithm=AlgorithmSettings.model_validate(recipe),
    )
    learner = Learner(settings)
    return learner, [learner.step(groups), learner.step(groups)]


@pytest.mark.parametrize("door", PAIRS)
def test_an_own_part_trains_as_the_built_in_one_of_its_formula(
    door: str, tiny: Path, group_of: Groups
) -> None:
    groups = [group_of(0, [1.0, 0.0, 0.5]), group_of(1, [0.0, 0.25])]
    (own, own_rows), (ours, our_rows) = (trained(tiny, recipe, groups) for recipe in PAIRS[door])
    for name, parameter in own.policy.model.state_dict().items():
        torch.testing.assert_close(parameter, ours.policy.model.state_dict()[name], rtol=1e-4, atol=1e-5)
    for mine, theirs in zip(own_rows, our_rows, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4, abs=1e-6)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
    if door == "loss":
        assert own_rows[0]["ratio"] > 0  # a statistic is a metric


def test_a_statistic_that_every_step_has_is_refused(tiny: Path, group_of: Groups, monkeypatch: Any) -> None:
    from tests import own_parts

    def named_badly(logprobs_N: Any, *rest: Any) -> Any:
        return -logprobs_N, {"entropy": logprobs_N}

    monkeypatch.setattr(own_parts, "alone", named_badly)
    with pytest.raises(
        OwnPartRefused, match=r"own_parts:alone returns a statistic 'entropy', which every step has"
    ):
        trained(tiny, {"loss": "tests.own_parts:alone"}, [group_of(0, [1.0, 0.0])])


def test_what_does_not_fit_ends_a_step_and_is_no_bad_batch(tiny: Path, group_of: Groups) -> None:
    with pytest.raises(
        OwnPartRefused, match=r"of shape \(\d+,\) for an episode of \d+ sampled tokens, not \(\)"
    ):
        trained(tiny, {"advantage": "tests.own_parts:one_number"}, [group_of(0, [1.0, 0.0])])
